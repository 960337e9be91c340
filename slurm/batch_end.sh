# What follows the processes of a job, in its batch script: the requeue that they have asked for, or one with more memory.
#   bash batch_end.sh STATUS_OF_SRUN RUNS/slurm LIMIT TASKS CPUS      memory per process in MB, 0: never more; per node; per task
trap '' TERM USR2 # a requeue ends what is left of the job
status=$1 limit=$3 tasks=$4 cpus=$5
job=$SLURM_JOB_ID
name=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
name=${name:-$job}
folder=$2/$name

running() { # a job that is being cancelled is not revived
    state=$(squeue --noheader --jobs="$job" --format=%T)
    [ "$state" = RUNNING ] || echo "job $job is ${state:-over}: not requeued"
    [ "$state" = RUNNING ]
}

out_of_memory() { # since the last start, in the words of SLURM
    awk '/Starting with JobEnvironment/ { seen = 0 }
         /^(slurmstepd|srun): error: .*(oom.kill|Out Of Memory|exceeded (job )?memory limit)/ { seen = 1 }
         END { exit !seen }' "$folder/${name}_0_log.out"
}

if [ -e "$folder/requeue" ]; then
    rm -f "$folder/requeue"
    if running; then
        echo "requeueing job $job"
        scontrol requeue "$job"
    fi
elif [ "$status" != 0 ] && [ "$limit" -gt 0 ] && out_of_memory; then
    if [ -n "$SLURM_MEM_PER_NODE" ]; then
        asked=$SLURM_MEM_PER_NODE most=$((limit * tasks)) share=1 field=MinMemoryNode of=node
    else
        asked=${SLURM_MEM_PER_CPU:-0} most=$((limit / cpus)) share=$((tasks * cpus)) field=MinMemoryCPU of=CPU
    fi
    by=cluster.memory_limit_gb
    largest=$(sinfo --noheader --partition="$SLURM_JOB_PARTITION" --format=%m 2>/dev/null | tr -d ' +' | sort -n | tail -1)
    if [ -n "$largest" ] && [ $((largest / share)) -lt "$most" ]; then
        most=$((largest / share)) by="the largest node of partition $SLURM_JOB_PARTITION"
    fi
    more=$((asked * 3 / 2 < most ? asked * 3 / 2 : most))
    if [ "$more" -le "$asked" ]; then
        echo "error: out of memory with $asked MB a $of, and $by allows no more"
    elif running; then
        echo "out of memory with $asked MB a $of: requeueing job $job with $more MB ($by: at most $most MB)"
        scontrol requeue "$job" && scontrol update "JobId=$job" "$field=$more"
    fi
fi
exit "$status"
