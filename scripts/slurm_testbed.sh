#!/usr/bin/env bash
# A real Slurm cluster on this machine, for the tests in tests/slurm: munge, MariaDB, slurmdbd, slurmctld and several slurmd,
# each node with its own host name and PID namespace, and with declared GPUs that do not exist. It needs no systemd.
#
#   scripts/slurm_testbed.sh up            starts it, or says that it is up already; INSTALL=1 installs missing packages
#   eval "$(scripts/slurm_testbed.sh env)" sets the variables that a shell needs to reach it
#   scripts/slurm_testbed.sh status        daemons, nodes, queue
#   scripts/slurm_testbed.sh down          stops it and removes everything that it created
#   scripts/slurm_testbed.sh kill-node N | kill-slurmd N | boot N | accounting stop|start | controller kill|start | set KEY=VALUE
#                                          cuts a node's power; kills only its daemon; boots it again; stops or starts slurmdbd;
#                                          kills slurmctld (kill -9: it loses unsaved state); sets a line of slurm.conf
#
# Everything lies below $SLURM_TESTBED (default ${TMPDIR:-/tmp}/ksweep-slurm); the only changes outside are marked lines in
# /etc/hosts. It signals only processes whose pid it recorded. Exit code 77: it cannot run here; the message says why.
set -u
BED=${SLURM_TESTBED:-${TMPDIR:-/tmp}/ksweep-slurm}
INSTALL=${INSTALL:-0}           # 1: install missing packages by apt-get
NODES=${NODES:-4}               # simulated nodes gpu1..gpuN
GPUS=${GPUS:-8}                 # declared GPUs on each
CPUS=${CPUS:-64}                # declared CPUs on each
MEMORY=${MEMORY:-512000}        # declared MiB on each
GRACE=${GRACE:-15}              # seconds between the preemption signal and the kill
MAX_ARRAY=${MAX_ARRAY:-1001}    # MaxArraySize
SLURMD_TIMEOUT=${SLURMD_TIMEOUT:-15}  # seconds until a silent node is down
CGROUP=${CGROUP:-0}             # 1: device and memory limits by cgroup v1; GPUs then count from 0 in every job. 0: memory is
                                # checked once a second, and a step above its limit is killed
PREEMPT_SIGNAL=${PREEMPT_SIGNAL:-1}   # 0: preempted jobs get SIGTERM only, as on most clusters
NAMESPACES=${NAMESPACES:-1}     # 0: nodes share host name and PIDs (where unshare is not allowed)
PORT=${PORT:-16817}             # slurmctld; slurmdbd 2 higher, slurmd from 184 higher. Below 19000: above, ranks meet. Two beds
                                # can be up at once with different ports
PREFIX=${PREFIX:-gpu}              # node names begin with it
MARK="# ksweep-slurm-testbed $BED"
HOST=$(hostname -s)
CANNOT=77
PACKAGES="slurmctld slurmd slurm-client slurmdbd slurm-wlm-mysql-plugin munge mariadb-server-core mariadb-client-core"
export SLURM_CONF=$BED/etc/slurm.conf MYSQL_UNIX_PORT=$BED/db.sock
PATH=$PATH:/usr/sbin:/sbin

say() { printf '[%3ds] %s\n' "$SECONDS" "$*" >&2; }
cannot() { # says why, and removes what the attempt created
  echo "slurm test bed: $*" >&2
  [ -f "$BED/etc/bed" ] || { rm -f "$BED/log/apt.out"; rmdir "$BED/log" "$BED"; } 2>/dev/null
  exit $CANNOT
}

programs_there() {
  local p
  for p in slurmctld slurmd slurmdbd sbatch sacctmgr munged mariadbd mariadb-install-db unshare; do
    command -v "$p" >/dev/null || { echo "$p"; return 1; }
  done
}

install() {
  local lacking
  lacking=$(programs_there) && return 0
  [ "$INSTALL" = 1 ] || cannot "$lacking is not installed; INSTALL=1 scripts/slurm_testbed.sh up installs the packages by apt-get"
  command -v apt-get >/dev/null || cannot "$lacking is not installed, and there is no apt-get to install it ($PACKAGES)"
  say "installing $PACKAGES"
  # shellcheck disable=SC2086
  { flock 9 && apt-get -qq update && DEBIAN_FRONTEND=noninteractive apt-get -y -qq install --no-install-recommends $PACKAGES; } \
    >"$BED/log/apt.out" 2>&1 9>/tmp/ksweep-apt.lock || cannot "apt-get cannot install $PACKAGES: $(tail -1 "$BED/log/apt.out")"
  lacking=$(programs_there) || cannot "$lacking is still missing after installing $PACKAGES"
}

spawn() { # name command...: starts it in its own session, with a pid file and a log
  local name=$1
  shift
  setsid "$@" >>"$BED/log/$name.out" 2>&1 </dev/null &
  echo $! >"$BED/run/$name.pid"
}

alive() { [ -r "/proc/$1/stat" ] && [ "$(awk '{print $3}' "/proc/$1/stat" 2>/dev/null)" != Z ]; } # an orphan may remain a zombie for seconds
runs() { [ -f "$BED/run/$1.pid" ] && alive "$(cat "$BED/run/$1.pid")"; }

await() { # what seconds command...: `what` may be the name of a daemon; if that has ended, waiting ends too
  local what=$1 end=$((SECONDS + $2))
  shift 2
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || { say "$what: no answer; logs in $BED/log"; return 1; }
    [ ! -f "$BED/run/$what.pid" ] || runs "$what" || { say "$what has ended: $(tail -n 1 "$BED/log/$what.out")"; return 1; }
    sleep 0.1
  done
}

write_configuration() {
  local i g plugin=task/none address=127.0.0.1 constrain=no every=task=1 kill=OverMemoryKill
  [ "$CGROUP" = 1 ] && plugin=task/cgroup constrain=yes every=30 kill=
  mkdir -p "$BED"/{etc,run,log,state,spool,dev,munge,db}
  chmod 755 "$BED" "$BED"/* && chmod 700 "$BED/munge"
  for ((i = 1; i <= NODES; i++)); do mkdir -p "$BED/spool/$PREFIX$i"; done
  for ((g = 0; g < GPUS; g++)); do # slurmd only checks that they exist; the number at the end is the index
    [ -e "$BED/dev/nvidia$g" ] || mknod "$BED/dev/nvidia$g" c 240 "$g" 2>/dev/null || : >"$BED/dev/nvidia$g"
  done
  # Ranks of a job meet at the first node's name, so names must resolve.
  grep -q "$MARK\$" /etc/hosts || for ((i = 1; i <= NODES; i++)); do echo "$address $PREFIX$i $MARK" >>/etc/hosts; done
  [ -s "$BED/munge/munge.key" ] || dd if=/dev/urandom of="$BED/munge/munge.key" bs=128 count=1 status=none
  chmod 400 "$BED/munge/munge.key"
  cat >"$BED/etc/slurm.conf" <<C
ClusterName=testbed
SlurmctldHost=$HOST($address)
SlurmUser=root
SlurmdUser=root
SlurmctldPort=$PORT
AuthType=auth/munge
# A requeued job waits until the credential of its last start has expired: 120 s by default
AuthInfo=socket=$BED/munge.sock,cred_expire=5
StateSaveLocation=$BED/state
SlurmdSpoolDir=$BED/spool/%n
SlurmctldPidFile=$BED/run/slurmctld.self
SlurmdPidFile=$BED/run/slurmd-%n.self
SlurmctldLogFile=$BED/log/slurmctld.log
SlurmdLogFile=$BED/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=$plugin
SwitchType=switch/none
MpiDefault=none
ReturnToService=2
SlurmdParameters=config_overrides
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
GresTypes=gpu
MaxArraySize=$MAX_ARRAY
# Ranks meet at a port that submitit derives from the job id; beds on one machine need different job ids
FirstJobId=$((PORT % 1000 * 50 + 1))
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=2,bf_interval=2,batch_sched_delay=1
SlurmctldTimeout=30
SlurmdTimeout=$SLURMD_TIMEOUT
InactiveLimit=0
KillWait=5
MinJobAge=300
MessageTimeout=10
TCPTimeout=2
JobRequeue=1
EnforcePartLimits=ALL
PreemptType=preempt/qos
PreemptMode=REQUEUE
PreemptExemptTime=0
$([ "$PREEMPT_SIGNAL" = 1 ] && preempt_signal_line)
PriorityType=priority/multifactor
PriorityWeightQOS=10000
AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=$address
AccountingStoragePort=$((PORT + 2))
# slurmctld reaches slurmdbd through this munge socket, not the one above
AccountingStoragePass=$BED/munge.sock
AccountingStorageEnforce=associations,limits,qos
AccountingStorageTRES=gres/gpu
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=$every
${kill:+JobAcctGatherParams=$kill}
JobCompType=jobcomp/none
DefMemPerCPU=1000
$(for ((i = 1; i <= NODES; i++)); do node_line "$i" "$address"; done)
PartitionName=main Nodes=ALL Default=YES MaxTime=7-0 DefaultTime=60 State=UP
PartitionName=preempt Nodes=ALL Default=NO MaxTime=1-0 DefaultTime=60 State=UP AllowQos=preemptable
C
  echo "NodeName=$PREFIX[1-$NODES] Name=gpu Type=h100 File=$BED/dev/nvidia[0-$((GPUS - 1))] Flags=nvidia_gpu_env" >"$BED/etc/gres.conf"
  cat >"$BED/etc/cgroup.conf" <<C
CgroupPlugin=cgroup/v1
CgroupMountpoint=/sys/fs/cgroup
CgroupAutomount=no
ConstrainDevices=$constrain
ConstrainRAMSpace=$constrain
C
  cat >"$BED/etc/slurmdbd.conf" <<C
AuthType=auth/munge
AuthInfo=socket=$BED/munge.sock
DbdHost=localhost
DbdAddr=$address
DbdPort=$((PORT + 2))
SlurmUser=root
LogFile=$BED/log/slurmdbd.log
PidFile=$BED/run/slurmdbd.self
StorageType=accounting_storage/mysql
StorageHost=localhost
StorageUser=root
StorageLoc=slurm_acct_db
C
  chmod 600 "$BED/etc/slurmdbd.conf"
  printf '%s\n' "NAMESPACES=$NAMESPACES" "NODES=$NODES" "PREFIX=$PREFIX" >"$BED/etc/bed"
}

preempt_signal_line() { # the option moved in 23.02
  local major
  major=$(slurmctld -V | sed 's/[^0-9]*\([0-9]*\).*/\1/')
  if [ "$major" -ge 23 ]; then echo PreemptParameters=send_user_signal; else echo SlurmctldParameters=preempt_send_user_signal; fi
}
node_line() {
  local host=$PREFIX$1
  [ "$NAMESPACES" = 1 ] || host=$HOST
  echo "NodeName=$PREFIX$1 NodeHostname=$host NodeAddr=$2 Port=$((PORT + 183 + $1)) CPUs=$CPUS Sockets=2 CoresPerSocket=$((CPUS / 2))" \
    "ThreadsPerCore=1 RealMemory=$MEMORY Gres=gpu:h100:$GPUS State=UNKNOWN"
}

# The first process of a node sets its name and starts slurmd. It ends when told to, and survives a crash of slurmd.
NODE_INIT='hostname "$1"; slurmd -D -N "$1" & p=$!; told=; trap "told=1; kill $p" TERM
while kill -0 $p 2>/dev/null; do wait $p; done
[ "$told" ] || { trap exit TERM; sleep infinity & wait $!; }'

boot_node() {
  if [ "$NAMESPACES" = 1 ]; then
    spawn "slurmd-$1" unshare --uts --mount --pid --fork --mount-proc --kill-child bash -c "$NODE_INIT" init "$1"
  else
    spawn "slurmd-$1" slurmd -D -N "$1"
  fi
}
first_process() { awk '{print $1}' "/proc/$1/task/$1/children" 2>/dev/null; }
node_process() { # the pid whose end is the end of the node
  local pid
  pid=$(cat "$BED/run/slurmd-$1.pid") || return 1
  if [ "$NAMESPACES" = 1 ]; then first_process "$pid"; else echo "$pid"; fi
}
slurmd_process() {
  local init child
  init=$(node_process "$1") || return 1
  [ "$NAMESPACES" = 1 ] || { echo "$init"; return; }
  for child in $(cat "/proc/$init/task/$init/children"); do
    [ "$(cat "/proc/$child/comm")" = slurmd ] && echo "$child" && return
  done
  return 1
}

database_answers() { mariadb --no-defaults -S "$BED/db.sock" -uroot -e 'select 1'; }
controller_answers() { scontrol ping | grep -q 'is UP'; }
nodes_idle() { [ "$(sinfo -h -N -p main -t idle -o %N | wc -l)" = "$NODES" ]; }
start_controller() { spawn slurmctld slurmctld -D -i && await slurmctld 30 controller_answers; }
start_accounting() { spawn slurmdbd slurmdbd -D && await slurmdbd 30 sacctmgr -n show cluster; }

start_database() {
  if [ ! -d "$BED/db/mysql" ]; then
    mariadb-install-db --user=root --datadir="$BED/db" --auth-root-authentication-method=normal --skip-test-db \
      >"$BED/log/mariadb-install.out" 2>&1 || { say "mariadb-install-db failed: $BED/log/mariadb-install.out"; return 1; }
  fi
  spawn mariadbd mariadbd --no-defaults --user=root --datadir="$BED/db" --socket="$BED/db.sock" \
    --pid-file="$BED/run/mariadbd.self" --skip-networking --innodb-buffer-pool-size=64M --innodb-log-file-size=32M \
    --innodb-flush-log-at-trx-commit=0 --innodb-lock-wait-timeout=900 --performance-schema=OFF
  await mariadbd 30 database_answers &&
    mariadb --no-defaults -S "$BED/db.sock" -uroot -e 'create database if not exists slurm_acct_db'
}

set_up_accounts() { # two sessions, as a session does not see the QOS that it has just added
  { echo "add cluster testbed"
    echo "add account lab"
    echo "add qos preemptable set GraceTime=$GRACE PreemptMode=requeue Priority=0"
    echo "add qos scavenger set PreemptMode=cancel Priority=0" # no grace, and not requeued
    echo "modify qos normal set Preempt=preemptable,scavenger Priority=100"
    echo "add qos urgent set Preempt=preemptable,scavenger,normal Priority=1000"; } | sacctmgr -i -Q >"$BED/log/accounts.out" 2>&1
  { echo "add user root account=lab"
    echo "modify user root set defaultaccount=lab qos=normal,preemptable,scavenger,urgent defaultqos=normal"; } |
    sacctmgr -i -Q >>"$BED/log/accounts.out" 2>&1
}

up() {
  local i
  if runs slurmctld && controller_answers; then say "already up: $BED"; return 0; fi
  [ "$(uname -s)" = Linux ] || cannot "needs Linux"
  [ "$(id -u)" = 0 ] || cannot "needs root (slurmd starts jobs as their users, node names go to /etc/hosts)"
  down
  mkdir -p "$BED/log" || cannot "$BED cannot be written"
  [ -w /etc/hosts ] || cannot "/etc/hosts cannot be written, and node names must resolve"
  install
  unshare --uts --mount --pid --fork --mount-proc true 2>/dev/null || { NAMESPACES=0; say "no namespaces available: nodes share host name and PIDs"; }
  write_configuration
  spawn munged munged -F -f --key-file="$BED/munge/munge.key" --socket="$BED/munge.sock" --pid-file="$BED/run/munged.self" \
    --log-file="$BED/log/munged.log" --seed-file="$BED/munge/seed"
  start_database && await munged 10 munge -n -S "$BED/munge.sock" && start_accounting && set_up_accounts || { down keep-logs; return 1; }
  spawn slurmctld slurmctld -D -i
  for ((i = 1; i <= NODES; i++)); do boot_node $PREFIX$i; done
  await slurmctld 30 controller_answers && await "$NODES idle nodes" 60 nodes_idle || { down keep-logs; return 1; }
  say "up: $NODES nodes with $GPUS GPUs each in $BED"
}

stop() { # name [signal]: signals it and waits until it has ended
  local pid _
  [ -f "$BED/run/$1.pid" ] || return 0
  pid=$(cat "$BED/run/$1.pid")
  [ "${2-}" = none ] || kill "-${2:-TERM}" "$pid" 2>/dev/null
  for _ in $(seq 100); do
    alive "$pid" || break
    sleep 0.1
  done
  if alive "$pid"; then kill -9 "$pid"; fi
  rm -f "$BED/run/$1.pid"
}

queue_empty() { [ -z "$(squeue -h)" ]; }
down() {
  local name
  [ -d "$BED/run" ] || { forget_hosts; return 0; }
  # shellcheck disable=SC1091
  [ ! -f "$BED/etc/bed" ] || . "$BED/etc/bed"
  if runs slurmctld && timeout 5 scontrol ping 2>/dev/null | grep -q 'is UP'; then
    squeue -h -o %A | sort -u | xargs -r scancel 2>/dev/null
    await "an empty queue" 20 queue_empty
  fi
  for name in $(cd "$BED/run" && ls slurmd-*.pid 2>/dev/null); do
    name=${name%.pid}
    kill "$(node_process "${name#slurmd-}")" 2>/dev/null
  done
  for name in $(cd "$BED/run" && ls slurmd-*.pid 2>/dev/null); do stop "${name%.pid}" none; done
  stop slurmctld
  for name in slurmdbd mariadbd munged; do stop $name KILL; done # they have no state to keep
  for name in /sys/fs/cgroup/*/slurm_$PREFIX[0-9]*; do
    [ ! -d "$name" ] || find "$name" -depth -type d -exec rmdir {} \; 2>/dev/null
  done
  forget_hosts
  if [ "${1-}" = keep-logs ]; then say "down; logs are kept in $BED/log"; elif [ -f "$BED/etc/bed" ]; then rm -rf "$BED"; fi
}
forget_hosts() { # edits in place: /etc/hosts is often a mount and cannot be replaced by a rename
  if grep -q "$MARK\$" /etc/hosts 2>/dev/null; then
    local rest
    rest=$(grep -v "$MARK\$" /etc/hosts)
    printf '%s\n' "$rest" >/etc/hosts
  fi
}

status() {
  local file name
  [ -d "$BED/run" ] || { echo "down"; return 1; }
  for file in "$BED"/run/*.pid; do
    name=$(basename "$file" .pid)
    printf '%-14s %s\n' "$name" "$(alive "$(cat "$file")" && echo "runs ($(cat "$file"))" || echo dead)"
  done
  sinfo -N -p main -o '%N %T %C %G'
  squeue
}

set_line() { # sets KEY=VALUE in slurm.conf and reloads all daemons; an empty value removes the line
  sed -i "/^${1%%=*}=/d" "$BED/etc/slurm.conf"
  [ -z "${1#*=}" ] || sed -i "1i $1" "$BED/etc/slurm.conf"
  scontrol reconfigure
}

# shellcheck disable=SC1091
[ ! -f "$BED/etc/bed" ] || [ "${1-}" = up ] || . "$BED/etc/bed"
case "${1-}" in
  up) up ;;
  down) down ;;
  status) status ;;
  env) echo "export SLURM_CONF=$SLURM_CONF MYSQL_UNIX_PORT=$MYSQL_UNIX_PORT" ;;
  kill-node) kill -9 "$(cat "$BED/run/slurmd-$2.pid")" ;;
  kill-slurmd) kill -9 "$(slurmd_process "$2")" ;;
  boot)
    ! runs "slurmd-$2" || kill -9 "$(cat "$BED/run/slurmd-$2.pid")"
    boot_node "$2"
    ;;
  accounting) if [ "${2-}" = stop ]; then stop slurmdbd KILL; else start_accounting; fi ;;
  controller) if [ "${2-}" = kill ]; then stop slurmctld KILL; else start_controller; fi ;;
  set) set_line "$2" ;;
  *)
    sed -n '2,/^set -u/p' "$0" | sed '/^set -u/d; s/^# \{0,1\}//'
    exit 2
    ;;
esac
