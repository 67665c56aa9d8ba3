"""What a run is, whichever engine trains it: the command line, the job, the folder it leaves.

Imports no engine; :mod:`cbn_det.plugin` (detectron2) and :mod:`cbn_det.standalone` (torchvision)
build on it.
"""
