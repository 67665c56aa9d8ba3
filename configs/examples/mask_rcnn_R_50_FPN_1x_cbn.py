# The norms in a LazyConfig: detectron2's Mask R-CNN R50-FPN, 1x, with CBN in FPN and heads and a
# 4conv1fc box head, at 16 images a step.
#
#   python tools/lazyconfig_train_net.py --num-gpus 8 \
#       --config-file configs/examples/mask_rcnn_R_50_FPN_1x_cbn.py
#
# detectron2's own tools/lazyconfig_train_net.py trains it, too, as this file registers the norms.
# It pools no running statistics of several GPUs before an evaluation, though, has no second pass
# for MBN, and takes a burn-in in iterations only: norm = "CBN(burn_in=60000)".
from detectron2 import model_zoo

import cbn_det

cbn_det.register()

model = model_zoo.get_config("common/models/mask_rcnn_fpn.py").model
dataloader = model_zoo.get_config("common/data/coco.py").dataloader
lr_multiplier = model_zoo.get_config("common/coco_schedule.py").lr_multiplier_1x
optimizer = model_zoo.get_config("common/optim.py").SGD
train = model_zoo.get_config("common/train.py").train

norm = "CBN"
model.backbone.norm = norm
model.backbone.bottom_up.freeze_at = 2
model.roi_heads.box_head.conv_norm = norm
model.roi_heads.box_head.conv_dims = [256, 256, 256, 256]
model.roi_heads.box_head.fc_dims = [1024]
model.roi_heads.mask_head.conv_norm = norm

train.init_checkpoint = "detectron2://ImageNetPretrained/MSRA/R-50.pkl"
train.output_dir = "output/examples/mask_rcnn_R_50_FPN_1x_cbn"
