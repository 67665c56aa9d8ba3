#!/usr/bin/env bash
# run_python.sh ARGUMENTS...  runs python from the source tree in an environment that has what make needs.
#
# The current python ($PYTHON, default python3) is used where detectron2 and torchvision work in it, and
# nothing is ever installed into it: what is missing for tests and demo goes to .venv, laid over it.
# Otherwise .venv is a full environment with a matching pair of torch and torchvision, the CPU builds where
# there is no GPU and pip's index has them. The outcome is remembered in .make/python until the python's
# packages or setup.py change.
set -euo pipefail

TORCH_PAIR=${TORCH_PAIR:-torch==2.14.1 torchvision==0.29.1}
MODULES="numpy fvcore pycocotools PIL tqdm tabulate sklearn tensorboard matplotlib jinja2 pytest pytest_timeout xdist black ruff"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$root/.make/python
base=${PYTHON:-python3}

say() { printf 'cbn_det: %s\n' "$*" >&2; }
fail() {
    say "$*"
    exit 1
}
works() { "$1" -c "import $2" >/dev/null 2>&1; }

# explain TEXT: ends with the line that says what to do about what pip or venv printed. Not every program
# names a full disk, hence the look at what is left.
explain() {
    if grep -qiE 'no space left|disk quota' <<<"$1" || ! "$base" -c "
import shutil, sys
sys.exit(min(shutil.disk_usage(folder).free for folder in sys.argv[1:]) < 20e6)" "$root" "${TMPDIR:-/tmp}" 2>/dev/null; then
        fail "the disk is full: free ${needs:-1 GB} (see: df -h '$root' '${TMPDIR:-/tmp}'), then run the same command again."
    elif grep -qiE 'no module named venv|ensurepip' <<<"$1"; then
        fail "$base cannot make virtual environments: install its venv module (Debian, Ubuntu: the package python3-venv), or name another python: make PYTHON=/path/to/python3 ..."
    elif grep -qiE 'retrying|connection|timed out|timeout|name resolution|proxyerror|sslerror|http error|incomplete' <<<"$1"; then
        fail "packages could not be fetched: check the network and pip's index (pip config list), then run the same command again."
    elif grep -qiE 'no matching distribution' <<<"$1"; then
        fail "pip's index has no $(sed -nE 's/.*No matching distribution found for ([^ ]+).*/\1/p' <<<"$1" | head -n 1) for $("$base" --version): take another python (make PYTHON=...) or another index (pip config list)."
    fi
    fail "setting up .venv failed: $(tail -n 1 <<<"$1")"
}

# make_venv WHAT REQUIREMENTS...: .venv anew, unless a whole one for WHAT is there.
make_venv() {
    local mark=$venv/made-by-cbn_det what=$1 printed site
    shift
    if [ -e "$venv" ] && [ ! -e "$mark" ]; then
        fail ".venv exists and was not made by this Makefile: activate it if it has detectron2, or move it away."
    fi
    [ ! -e "$mark" ] || [ "$(cat "$mark")" != "$what" ] || return 0
    rm -rf "$venv"
    mkdir "$venv" && touch "$mark" # empty until all is there
    printed=$("$base" -m venv "$venv" 2>&1) || explain "$printed"
    if [ -n "$outer" ]; then # --system-site-packages would show another python's where $PYTHON is an environment
        site=$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")
        printf '%s\n' "$outer" >"$site/outer.pth"
    fi
    say "installing into .venv, which is done once and takes up to $needs: $*"
    { printed=$("$venv/bin/python" -m pip install "$@" 2>&1 >&3); } 3>&2 || explain "$printed"
    printed=$("$venv/bin/python" -c "import torchvision.ops, ${MODULES// /,}" 2>&1) ||
        fail "what is in .venv does not work ($(tail -n 1 <<<"$printed")): run make distclean, then the same command again, with TORCH_PAIR='torch==X torchvision==Y' if it is those two."
    printf '%s\n' "$what" >"$mark"
    say "the python for every other command is $venv/bin/python, or: source .venv/bin/activate"
}

# choose_torch: sets $pair and $needs.
choose_torch() {
    local one
    pair=$TORCH_PAIR needs="9 GB (6 GB of it CUDA)"
    ! nvidia-smi -L >/dev/null 2>&1 || return 0
    for one in $TORCH_PAIR; do
        "$base" -m pip index versions "${one%%==*}" 2>/dev/null | grep -qF -- "${one##*==}+cpu" || return 0
    done
    pair=$(sed -E 's/==[^ ]+/&+cpu/g' <<<"$TORCH_PAIR") needs="2 GB"
}

# choose_python: sets $python.
choose_python() {
    local outer="" pair needs wanted=$root/.make/requirements.txt
    "$base" -c "import runpy; m = runpy.run_path('$root/setup.py'); print(*m['REQUIRES'], *m['EXTRAS']['dev'], sep='\n')" >"$wanted"
    python=$("$base" -c "import sys; print(sys.executable)")
    if ! works "$base" "detectron2.layers, torchvision.ops"; then
        say "$base has no working detectron2: using an environment of our own, .venv, and the standalone engine."
        choose_torch
        # One command, so that pip resolves torch and torchvision as a pair.
        # shellcheck disable=SC2086
        make_venv "full $python $pair" $pair -r "$wanted"
    elif works "$base" "${MODULES// /,}"; then
        return
    else
        outer=$("$base" -c "import sys; print('import site;', '; '.join(f'site.addsitedir({p!r})' for p in sys.path if p.endswith(('site-packages', 'dist-packages'))))")
        needs="1 GB"
        # .venv's own setuptools hides the one outside, and detectron2 needs pkg_resources.
        make_venv "over $python" "setuptools<81" -r "$wanted"
    fi
    python=$venv/bin/python
}

"$base" -c "" >/dev/null 2>&1 || fail "no python at '$base': install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3 ..."
"$base" -c "import sys; sys.exit(sys.version_info < (3, 10))" || fail "$("$base" --version 2>&1) is too old: Python 3.10 or newer is needed: make PYTHON=/path/to/python3 ..."
# With our own .venv activated, the python to look at is the one below it.
if [ "$("$base" -c 'import sys; print(sys.prefix)')" = "$venv" ] && [ -e "$venv/made-by-cbn_det" ]; then
    base=$("$base" -c 'import sys; print(sys._base_executable)')
fi
mkdir -p "$root/.make" 2>/dev/null || fail "cannot write to $root: check its permissions and the free disk space."
# What the python looks like now; it changes when a package is installed or removed.
now=$("$base" -c "
import os, sys, sysconfig, zlib
print(sys.executable, sys.version.split()[0], os.stat(sysconfig.get_path('purelib')).st_mtime_ns, *(zlib.crc32(open(p, 'rb').read()) for p in sys.argv[1:]))" \
    "$root/setup.py" "${BASH_SOURCE[0]}")" $TORCH_PAIR"
remembered() { [ "$(head -n 1 "$stamp" 2>/dev/null)" = "$now" ] && python=$(tail -n 1 "$stamp") && [ -x "$python" ]; }
if ! remembered; then
    trap 'say "stopped: run the same command again."; exit 130' INT
    # One set-up at a time. The lock is the open file's, so it ends with this process, however it ends.
    exec 9>"$root/.make/lock"
    "$base" -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)" 2>/dev/null ||
        { say "another make is setting up .venv here: waiting for it." && "$base" -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX)"; }
    if ! remembered; then
        choose_python
        printf '%s\n%s\n' "$now" "$python" >"$stamp"
    fi
    exec 9>&-
    trap - INT
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$@"
