#!/bin/sh
# Runs fuzzers one after the other: the corpus of each, then $FUZZ_SECONDS of changed inputs. One that does not
# come back has failed; the input that stopped it is in fuzz-NAME.crash.
status=0
export FUZZ_SECONDS="${FUZZ_SECONDS:-10}"
for program in "$@"; do
    name=$(basename "$program")
    $RUN "$program" || { echo "FAIL $name"; echo "suite $name: 0 passed, 1 failed, 0 skipped"; status=1; }
done
exit $status
