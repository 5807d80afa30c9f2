#!/usr/bin/env bash
# A Slurm of one machine for tests, as root and without systemd: `slurm.sh up FOLDER PORT`, `slurm.sh down FOLDER`.
#
# Jobs of the partition `urgent` preempt those of `main`. Everything lies under FOLDER (short: a socket's path has at most 108 characters) and listens on 127.0.0.1 alone.
# Commands of Slurm find it by SLURM_CONF=FOLDER/slurm.conf. No cgroups, no data base; arrays have at most three indexes.
set -euo pipefail
folder=$2
conf=$folder/slurm.conf
export SLURM_CONF=$conf

up() {
    port=$1
    mkdir -p "$folder"/{munge,state,log,run,spool,tmp}
    chmod 755 "$folder" "$folder/munge"
    host=$(hostname -s)
    (umask 077; head -c 128 /dev/urandom > "$folder/munge/key")
    cat > "$conf" << CONF
ClusterName=ci
SlurmctldHost=$host(127.0.0.1)
SlurmUser=root
SlurmdUser=root
SlurmdParameters=config_overrides
SlurmctldPort=$port
AuthType=auth/munge
CredType=cred/munge
AuthInfo=socket=$folder/munge/socket,cred_expire=5
CommunicationParameters=NoInAddrAny,NoCtldInAddrAny
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
TmpFS=$folder/tmp
SwitchType=switch/none
ReturnToService=2
SlurmctldPidFile=$folder/run/slurmctld.pid
SlurmdPidFile=$folder/run/slurmd.pid
SlurmctldLogFile=$folder/log/slurmctld.log
SlurmdLogFile=$folder/log/slurmd.log
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SchedulerType=sched/backfill
SchedulerParameters=sched_min_interval=0,sched_interval=1,bf_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
JobRequeue=1
MaxArraySize=3
KillWait=10
MinJobAge=300
CompleteWait=0
NodeName=n1 NodeHostname=$host NodeAddr=127.0.0.1 Port=$((port + 1)) CPUs=2 State=UNKNOWN
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PartitionName=main Nodes=ALL Default=YES MaxTime=60 PriorityTier=1 GraceTime=20 State=UP
PartitionName=urgent Nodes=ALL MaxTime=60 PriorityTier=2 State=UP
CONF
    munged --key-file="$folder/munge/key" --socket="$folder/munge/socket" --pid-file="$folder/run/munged.pid" \
        --log-file="$folder/log/munged.log" --seed-file="$folder/munge/seed" --num-threads=2 --force 2> /dev/null
    slurmctld -c
    slurmd -N n1 -c
    for _ in $(seq 200); do
        [ "$(sinfo -h -o %T 2> /dev/null)" = idle ] && exit 0
        sleep 0.1
    done
    tail -n 20 "$folder"/log/*.log >&2
    exit 1
}

# Ends what `up` started, by the numbers that it wrote down.
down() {
    scancel --user=root 2> /dev/null || true
    for _ in $(seq 100); do
        [ -z "$(squeue -h 2> /dev/null)" ] && break
        sleep 0.1
    done
    for name in slurmd slurmctld munged; do
        pid=$(cat "$folder/run/$name.pid" 2> /dev/null) || continue
        kill "$pid" 2> /dev/null || true
        for _ in $(seq 100); do
            grep -q '^State:[[:space:]]*[^Z]' "/proc/$pid/status" 2> /dev/null || break
            sleep 0.05
        done
    done
}

case $1 in
    up) up "$3" ;;
    down) down ;;
esac
