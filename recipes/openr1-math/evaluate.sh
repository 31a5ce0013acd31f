#!/usr/bin/env bash
# The paper's evaluation of one model: avg@32 on AIME24, AIME25 and AMC, pass@1 on the other three,
# at temperature 0.6; answers go to OUTPUT/k32 and OUTPUT/k1. Options behind the three names go to
# both commands. The same call goes on where it was interrupted.
#
#   bash recipes/openr1-math/evaluate.sh MODEL SETS OUTPUT [OPTIONS OF stableopd eval]
set -euo pipefail
MODEL=$1
SETS=$2
OUTPUT=$3

evaluate() {
    stableopd eval --model "$MODEL" --temperature 0.6 --max-new-tokens 8192 --grader math "$@"
}
evaluate --data "$SETS/aime24.jsonl" --data "$SETS/aime25.jsonl" --data "$SETS/amc.jsonl" \
    -k 32 --output "$OUTPUT/k32" "${@:4}"
evaluate --data "$SETS/math500.jsonl" --data "$SETS/minerva.jsonl" \
    --data "$SETS/olympiadbench.jsonl" -k 1 --output "$OUTPUT/k1" "${@:4}"
