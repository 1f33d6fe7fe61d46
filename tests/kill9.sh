#!/bin/sh
# Kills training runs that save each step with kill -9, 200 times or as often as the argument says, and resumes them:
# every resumption must work, and every run end in the bits of an uninterrupted one. The test itself: test_checkpoint.c.
cd "$(dirname "$0")/.." || exit 1
make -s build/test_checkpoint && MFT_KILLS="${1:-200}" build/test_checkpoint
