#!/bin/sh
# criu restore --action-script keep-ghosts.sh …
#
# Brings deleted files back by name, as copies, into the container that CRIU restores, before its
# tasks go on: for the recovery of what they had open only.
#
# pre-restore   no process is there yet: can it be done at all? Damaged images, ghosts that are
#               refused, and full disks end CRIU's restore here, before it begins.
# post-restore  the tasks are in their mount namespaces and do not run yet: it is done.
#
# A status that is not 0 makes CRIU give up, in both; then nothing was kept. GHOSTPOOL_OPTIONS, from
# CRIU's environment, are further options of both commands, GHOSTPOOL_PLAN those of the first alone
# (--external KEY=PATH for what CRIU mounts from outside).
set -eu

case "$CRTOOLS_SCRIPT_ACTION" in
pre-restore)
    # shellcheck disable=SC2086  # options are split into words
    exec ghostpool plan --keep -D "$CRTOOLS_IMAGE_DIR" ${GHOSTPOOL_OPTIONS:-} ${GHOSTPOOL_PLAN:-}
    ;;
post-restore)
    # shellcheck disable=SC2086
    exec ghostpool restore --keep -D "$CRTOOLS_IMAGE_DIR" -t "$CRTOOLS_INIT_PID" \
        ${GHOSTPOOL_OPTIONS:-}
    ;;
esac
