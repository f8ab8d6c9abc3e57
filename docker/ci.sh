#!/usr/bin/env bash
# Containers for real: build the images, run the mocked trial in them and natively, compare every byte, run the tests that
# need an engine. Uses the engine that answers; where none does and we are root on Debian or Ubuntu, installs and starts
# one of its own and takes it down again. Where neither can be had: SKIPPED, with the reason, and exit code 0.
#
#     docker/ci.sh          # after make setup; works in a clone of HEAD, so it sees what is committed and leaves nothing
#
# NATIVE_TRIAL=FILE: a native trial of HEAD is in data/trial and models/trial as soon as FILE exists, which is waited for;
# it is what is compared with.
set -euo pipefail
cd "$(dirname "$0")/.."
root=$PWD
work=$(mktemp -d -t synthmill-ci.XXXXXX)
engine_pid=""
bridge_was_there=$(ls -d /sys/class/net/docker0 2>/dev/null || true)

started=$(date +%s)
say() { printf 'containers: %3d s  %s\n' $(($(date +%s) - started)) "$*"; }
skip() {
    printf '\n==== SKIPPED: containers ====\n%s\n' "$*"
    exit 0
}
clean_up() {
    set +e
    if [ -n "$engine_pid" ]; then
        kill "$engine_pid" 2>/dev/null
        wait "$engine_pid" 2>/dev/null
        [ -n "$bridge_was_there" ] || ip link delete docker0 2>/dev/null
        [ ! -s "$work/iptables" ] || iptables-restore <"$work/iptables" # it leaves its rules, and forwards nothing else
    fi
    cd /
    grep -o "$work[^ ]*" /proc/mounts 2>/dev/null | sort -r | while read -r place; do umount "$place"; done
    rm -rf "$work" "$work.disk"
}
trap clean_up EXIT
trap 'exit 130' INT TERM

# ------------------------------------------------------------------------------------------------ an engine and a client

may_install() { [ "$(id -u)" = 0 ] && [ -f /etc/debian_version ] && command -v apt-get >/dev/null; }

# install PROGRAM PACKAGE...: unless the program is there
install() {
    command -v "$1" >/dev/null || [ -x "/usr/sbin/$1" ] && return
    shift
    # Where a network only swallows what is sent, apt would wait for minutes on each of its servers.
    [ -n "${updated:-}" ] || timeout --foreground 90 apt-get update -qq >"$work/apt.log" 2>&1 || return
    updated=yes
    DEBIAN_FRONTEND=noninteractive timeout --foreground 180 apt-get install -qq -y --no-install-recommends "$@" >>"$work/apt.log" 2>&1
}

# The client must build with BuildKit: what a distribution calls `docker` may not have its buildx.
with_buildkit() {
    local candidate
    for candidate in ${DOCKER:-$(tr : '\n' <<<"$PATH" | sed 's,$,/docker,')}; do
        if printf 'FROM scratch\nLABEL is=nothing\n' | DOCKER_BUILDKIT=1 "$candidate" build -q - >/dev/null 2>&1; then
            echo "$candidate"
            return
        fi
    done
}

if ! docker version >/dev/null 2>&1; then
    may_install || skip "no Docker engine answers, and this is not root on Debian or Ubuntu, who could install one"
    install dockerd docker.io iptables || skip "no Docker engine answers, and docker.io cannot be installed: $(tail -1 "$work/apt.log")"
    export PATH="$PATH:/usr/sbin" DOCKER_HOST="unix://$work/docker.sock"
    # A disk of its own where that can be: taking 100,000 files away again is then removing one, not minutes.
    if truncate -s 20G "$work.disk" && mkfs.ext4 -q "$work.disk" 2>/dev/null; then
        mount -o loop "$work.disk" "$work" 2>/dev/null || true
    fi
    iptables-save >"$work/iptables" 2>/dev/null || true
    dockerd --data-root "$work/engine" --exec-root "$work/exec" --pidfile "$work/docker.pid" -H "$DOCKER_HOST" \
        >"$work/engine.log" 2>&1 &
    engine_pid=$!
    for _ in $(seq 60); do
        docker version >/dev/null 2>&1 && break
        kill -0 "$engine_pid" 2>/dev/null || break
        sleep 0.5
    done
    docker version >/dev/null 2>&1 || skip "an engine was installed and does not start: $(tail -1 "$work/engine.log")"
    say "started an engine of our own, $(docker version --format '{{.Server.Version}}')"
fi
DOCKER=$(with_buildkit)
[ -n "$DOCKER" ] || skip "an engine answers, but no client here builds with BuildKit (docker-buildx)"
export DOCKER

# ------------------------------------------------------------------------------------------------ a base and the images

git clone -q . "$work/clone"
cd "$work/clone"
mkdir .venv
ln -s "$root"/.venv/* .venv/
cp "$root/uv.lock" .
sleep 1 # newest of all, in this order: set-up is done
touch .venv/.setup
sleep 1
touch uv.lock

default=$(sed -n 's/^ARG BASE_IMAGE=//p' docker/Dockerfile)
limit=$(command -v timeout || true) # macOS has none
if [ -z "${BASE_IMAGE:-}" ] && ! ${limit:+timeout 120} docker pull -q "$default" >/dev/null 2>&1; then
    may_install || skip "$default cannot be pulled, and this is not root on Debian or Ubuntu, who could make a base"
    install debootstrap debootstrap debian-archive-keyring || skip "debootstrap cannot be installed: $(tail -1 "$work/apt.log")"
    export BASE_IMAGE=synthmill-base:bookworm
    timeout --foreground 900 debootstrap --variant=minbase --include=python3-venv,ca-certificates bookworm "$work/base" >"$work/debootstrap.log" 2>&1 ||
        skip "$default cannot be pulled, and debootstrap makes no base: $(tail -1 "$work/debootstrap.log")"
    # Behind a proxy that signs for itself, the host's certificates are the ones that hold.
    cat "${SSL_CERT_FILE:-/etc/ssl/certs/ca-certificates.crt}" >"$work/base/etc/ssl/certs/ca-certificates.crt"
    rm -rf "$work"/base/var/cache/apt/* "$work"/base/var/lib/apt/lists/* "$work"/base/usr/share/{doc,man,locale}
    tar -C "$work/base" -c . | docker import - "$BASE_IMAGE" >/dev/null
    rm -rf "$work/base"
    say "made a base with debootstrap, as $default cannot be pulled"
fi

# The index as a secret, with a password in it that must not be found in any image (tests/test_docker.py looks for it).
find_index='from pip._internal.models.index import PyPI; print(PyPI.simple_url)'
index=$(.venv/bin/python -c "$find_index" 2>/dev/null || python3 -c "$find_index" 2>/dev/null || true)
export PACKAGE_INDEX="${PACKAGE_INDEX:-${index/:\/\//:\/\/synthmill:not-a-real-password@}}"
export DOCKER_BUILD_FLAGS="${DOCKER_BUILD_FLAGS:---network host --progress plain}"
SECONDS=0
.venv/bin/python docker/images.py >"$work/images.log" 2>&1 || { tail -40 "$work/images.log"; exit 1; }
seconds=$SECONDS
grep -E '^(llm|data) ' "$work/images.log"
say "images in $seconds s"
[ "$seconds" -le 300 ] || { echo "error: the images took $seconds s to build; at most 300 are allowed" >&2; exit 1; }

# ------------------------------------------------------------------------------------------------ the same bytes

# trial RUNNER: make one in the clone, and put what it made aside
trial() {
    SECONDS=0
    make trial RUNNER="$1" >"$work/$1.log" 2>&1 || { tail -40 "$work/$1.log"; exit 1; }
    say "make trial RUNNER=$1 in $SECONDS s"
    mkdir "$work/$1"
    mv data/cache "$work/$1/"
    mv data/trial "$work/$1/data"
    mv models/trial "$work/$1/models"
}
unset BATCH BUDGET_USD LIMIT RUN STANDIN_URL
export APIS=mock
# of_head: whether every stage of the trial there ran on what the clone holds
of_head() {
    local reports
    reports=$(find "$root/data/trial" "$root/models/trial" -name '*.report.json' 2>/dev/null)
    [ -n "$reports" ] && [ -z "$(xargs grep -L "\"git\": \"$(git rev-parse HEAD)\"" <<<"$reports")" ]
}
while [ -n "${NATIVE_TRIAL:-}" ] && [ ! -e "$NATIVE_TRIAL" ]; do sleep 1; done
if [ -n "${NATIVE_TRIAL:-}" ] && of_head; then
    mkdir "$work/native"
    cp -R "$root/data/trial" "$work/native/data"
    cp -R "$root/models/trial" "$work/native/models"
    # What 03 and 15 generated is not generated again: they run natively in either trial.
    mkdir -p data/cache
    cp "$root"/data/cache/generations_mock.sqlite* data/cache/
else
    trial native
fi
trial docker
grep -q '^runner: docker' "$work/docker.log" || { echo "error: the trial did not run in containers" >&2; exit 1; }
# Reports, receipts and the card of the model hold times; a report also says where it was made.
same=(--exclude='*.report.json' --exclude='.*.lock')
diff -r "${same[@]}" "$work/docker/data" "$work/native/data"
diff -r "${same[@]}" --exclude='1[456]_*.json' --exclude=README.md "$work/docker/models" "$work/native/models"
count=$(cd "$work/docker" && find data models -type f -size +0 ! -name '*.report.json' ! -name '1[456]_*.json' ! -name README.md | wc -l)
[ "$count" -ge 40 ] || { echo "error: only $count files to compare" >&2; exit 1; }
foreign=$(find "$work/docker" ! -user "$(id -un)" | head -3)
[ -z "$foreign" ] || { echo "error: not ours: $foreign" >&2; exit 1; }
say "$((count)) files have the same bytes in containers and natively, all of them ours"

# ------------------------------------------------------------------------------------------------ the tests with an engine

if may_install && [ -n "$engine_pid" ]; then
    "$DOCKER" compose version >/dev/null 2>&1 || install docker-compose docker-compose || true # else those tests are skipped
fi
.venv/bin/python -m pytest -rs tests/test_docker.py
