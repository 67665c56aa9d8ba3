"""The commands of ``cbn-det`` that have no other home: each reads its arguments and calls one
function. ``tools/`` has a script for each, for a clone that is not installed."""
