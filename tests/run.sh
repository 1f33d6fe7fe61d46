#!/bin/sh
# Runs test programs one after the other and sums their `suite NAME: N passed, N failed, N skipped` lines.
# A program that ends badly without such a line counts as one failure. The last line is the sum.
log=$(mktemp) || exit 1
trap 'rm -f "$log"' EXIT
passed=0; failed=0; skipped=0
for program in "$@"; do
    $RUN "$program" > "$log" 2>&1
    status=$?
    cat "$log"
    line=$(grep '^suite ' "$log" | tail -n 1)
    if [ -n "$line" ]; then
        set -- $(printf '%s\n' "$line" | sed 's/.*: \([0-9]*\) passed, \([0-9]*\) failed, \([0-9]*\) skipped.*/\1 \2 \3/')
        passed=$((passed + $1)); failed=$((failed + $2)); skipped=$((skipped + $3))
        if [ "$status" -ne 0 ] && [ "$2" -eq 0 ]; then echo "FAIL $program: exit status $status"; failed=$((failed + 1)); fi
    else
        echo "FAIL $program: exit status $status and no report"; failed=$((failed + 1))
    fi
done
echo "$passed passed, $failed failed, $skipped skipped"
[ "$failed" -eq 0 ]
