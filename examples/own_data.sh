#!/usr/bin/env bash
# Your preferences, your two models, every stage by its own command.
#
#     examples/own_data.sh TEACHER STUDENT train.jsonl test.jsonl runs/mine [--config.key=value ...]
#
# TEACHER and STUDENT are folders in Hugging Face format or hub ids. A line of the data looks like
#     {"prompt": "How do I boil an egg?", "chosen": "Seven minutes in boiling water.", "rejected": "Look it up."}
# and docs/data.md lists the other layouts. What stands behind the workdir goes to every command that takes settings:
#     --config.data.limit=64 --config.data.test_limit=32    a first try
#     --config.train.beta=0.2 --config.train.loss=ipo       another loss; every setting stands in ctpd_jax/settings.py
#
# Every stage goes on where it was stopped, and a finished one is not repeated: give the same command again.
set -euo pipefail
if [ $# -lt 5 ]; then
    sed -n '2,13s/^# \{0,1\}//p' "$0"
    exit 2
fi
teacher=$1 student=$2 train=$3 test=$4 workdir=$5
shift 5
settings=(
    --config "$(dirname "$0")/../configs/pair.py"
    --config.teacher.path="$teacher" --config.student.path="$student"
    --config.data.train="$train" --config.data.test="$test" "$@"
)
run=("${settings[@]}" --workdir "$workdir")

# 1. What becomes of every row, before anything is paid for: kept, left out and why, the first pair as it was read.
ctpd inspect --data "$train" --teacher "$teacher" --student "$student"

# 2. Both models learn the format of the answers, so that neither is surprised by what it will judge.
ctpd sft "${run[@]}"

# 3. The contrastive pair, out of the teacher: DPO, and DPO with the sides swapped. They know which spans matter.
ctpd dpo "${run[@]}"
ctpd dpo --reverse "${run[@]}"

# 4. The teacher, the pair and the student's start read all answers once. Training will need this alone, and no teacher.
ctpd annotate "${run[@]}"
ctpd inspect --pair 0 "${run[@]}" # one pair: its spans, both tokenizations, the weights

# 5. The student learns, by CTPD; then the table of accuracies, the page to look at, and the model folder.
ctpd train "${run[@]}"
ctpd evaluate "${run[@]}" # prints the table, writes report.html
ctpd export "${run[@]}"   # writes export/, which transformers opens

# 6. Ask it something.
ctpd generate --folder "$workdir/export" --prompt "How do I boil an egg?" --temperature 0.7 --max-new-tokens 64

# All of 2 to 5 in one command, with plain DPO of the student beside it where config.student_dpo.steps is 0 or more:
#     ctpd run --config configs/pair.py --workdir runs/mine --config.teacher.path=... (the settings above)
