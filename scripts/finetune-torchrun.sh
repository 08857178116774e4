#!/bin/bash
# A row of the published transfer tables on one machine: every seed frozen and fine-tuned, one process a GPU, each taking the next of its share of runs.
#     scripts/finetune-torchrun.sh NAME --preset published-dfc2020 --data STORE --test STORE --sensors s2 --encoders CHECKPOINT     again, the same, to go on
# SEEDS="0 1 2" names other seeds, PROCESSES=2 another number of processes (on a machine without a GPU it has to be given). The runs are NAME-frozen-42 and so on.
# A run that fails ends them all; started again, finished runs are passed over. `cromss.results.command(task, sensor, row, by="torchrun")` gives the line for every row.
set -eu
NAME=${1:?give the runs a name: scripts/finetune-torchrun.sh NAME --data STORE --test STORE [options of cromss finetune]}
if [ -z "${CROMSS_SHARE:-}" ]; then
    export CROMSS_SHARE=1 OMP_NUM_THREADS=1      # the data workers are processes
    exec torchrun --standalone --nproc-per-node "${PROCESSES:-gpu}" --no-python bash "$0" "$@"
fi

rank=$LOCAL_RANK world=$LOCAL_WORLD_SIZE
IFS=, read -ra gpus <<< "${CUDA_VISIBLE_DEVICES:-}"
export CUDA_VISIBLE_DEVICES=${gpus[rank]:-$rank}
unset $(compgen -e | grep -E '^(TORCHELASTIC|MASTER|GROUP|ROLE|LOCAL)_|^RANK$|^WORLD_SIZE$')      # the runs know nothing of each other

runs=()
for mode in frozen finetuned; do for seed in ${SEEDS:-42 43 44 45 46}; do runs+=("$mode $seed"); done; done
for ((i = rank; i < ${#runs[@]}; i += world)); do
    read -r mode seed <<< "${runs[i]}"
    cromss finetune "${@:2}" --mode "$mode" --seed "$seed" --name "$NAME-$mode-$seed" --resume auto
done
