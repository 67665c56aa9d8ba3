#!/usr/bin/env bash
# run_python.sh ARGUMENTS...  runs python from the source tree in an environment that has what make needs.
#
# The current python ($PYTHON, default python3) is used where detectron2 and torchvision work in it, and
# nothing is ever installed into it: what is missing for tests and demo goes to .venv, laid over it.
# Otherwise .venv is a full environment with a matching pair of torch and torchvision (a CPU build of
# torch beside another torchvision fails at import: "operator torchvision::nms does not exist").
# The outcome is remembered in .make/python until the python's packages or setup.py change. What goes
# wrong on the way ends with one line that says what to do; the same command then goes on.
set -euo pipefail

TORCH_PAIR=${TORCH_PAIR:-torch==2.14.1 torchvision==0.29.1}
MODULES="numpy fvcore pycocotools PIL tqdm tabulate sklearn tensorboard matplotlib rich jinja2 pytest pytest_timeout xdist black ruff"
NEEDS_GB=9 # CUDA build of torch: 6 GB in place and its wheels on the way

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$root/.make/python
log=$root/.make/install.log
base=${PYTHON:-python3}
beat=

say() { printf 'cbn_det: %s\n' "$*" >&2; }
fail() {
    say "$*"
    exit 1
}

disk_full() { fail "the disk is full: free $NEEDS_GB GB (see: df -h '$root' '${TMPDIR:-/tmp}'), then run the same command again: it goes on."; }

# is_full TEXT: whether a command that printed TEXT failed for want of disk space. Not every program
# says so, hence the look at what is left.
is_full() {
    grep -qiE 'no space left|disk quota' <<<"$1" || ! "$base" -c "
import shutil, sys
sys.exit(min(shutil.disk_usage(folder).free for folder in sys.argv[1:]) < 20e6)" "$root" "${TMPDIR:-/tmp}" 2>/dev/null
}

stop_beat() {
    [ -z "$beat" ] || kill "$beat" 2>/dev/null || true
    beat=
}

# heartbeat: a sign of life every 20 seconds, for pip's long silences (large wheels, no terminal).
heartbeat() {
    trap 'kill "$!" 2>/dev/null; exit 0' INT TERM
    while kill -0 $$ 2>/dev/null; do
        sleep 20 >/dev/null 2>&1 3>&- & # holds nothing open should it be left alone
        wait "$!"
        say "still installing: ${SECONDS} s, $(du -sh "$venv" 2>/dev/null | cut -f 1) in .venv"
    done
}

# drop_half_installed: forgets the packages whose installation was broken off. pip takes any package
# with a .dist-info folder for installed, but writes INSTALLER into it only after all other files.
drop_half_installed() {
    local info
    for info in "$venv"/lib*/python*/site-packages/*.dist-info; do
        [ ! -d "$info" ] || [ -e "$info/INSTALLER" ] || rm -rf "$info"
    done
}

# pip_install WHAT...: into .venv. Progress is shown as it comes; errors go to the log, and one line says
# what to do about them. They are held in a variable because a full disk takes no log.
pip_install() {
    local errors
    say "installing into .venv, which is done once: $*"
    drop_half_installed
    heartbeat 9>&- &
    beat=$!
    if errors=$("$venv/bin/python" -m pip install "$@" 2>&1 >&3); then
        stop_beat
        return
    fi
    stop_beat
    printf '%s\n' "$errors" 2>/dev/null >"$log" || true
    if is_full "$errors"; then
        disk_full
    elif grep -qiE 'retrying|connection|timed out|timeout|name resolution|proxyerror|sslerror|http error|incomplete' <<<"$errors"; then
        fail "packages could not be fetched: check the network and pip's index (pip config list), then run the same command again: it goes on. Details: .make/install.log"
    elif grep -qiE 'no matching distribution' <<<"$errors"; then
        fail "pip's index has no $(sed -nE 's/.*No matching distribution found for ([^ ]+).*/\1/p' <<<"$errors" | head -n 1) for $("$base" --version): take another python (make PYTHON=...) or another index (pip config list)."
    fi
    fail "pip failed: $(grep -i '^error' <<<"$errors" | tail -n 1) Read .make/install.log, then run the same command again."
}

requirements() {
    "$base" -c "import runpy; m = runpy.run_path('$root/setup.py'); print('\n'.join(m['REQUIRES'] + m['EXTRAS']['dev']))"
}

# What the python looks like now; it changes when a package is installed or removed.
fingerprint() {
    "$base" - "$root/setup.py" "${BASH_SOURCE[0]}" "$TORCH_PAIR" <<'PY'
import hashlib, os, sys, sysconfig
files = b"".join(open(path, "rb").read() for path in sys.argv[1:3])
print(sys.executable, sys.version.split()[0], os.stat(sysconfig.get_path("purelib")).st_mtime_ns,
      hashlib.sha256(files + sys.argv[3].encode()).hexdigest()[:16])
PY
}

works() { "$1" -c "import $2" >/dev/null 2>&1; }

# check_venv MODULES: what was just installed into .venv must import.
check_venv() {
    local printed
    printed=$("$venv/bin/python" -c "import $1" 2>&1) ||
        fail "what is in .venv does not work ($(tail -n 1 <<<"$printed")): run make distclean, then the same command again."
}

# new_venv WHAT...: an empty .venv, unless a whole one for the same WHAT is there already.
new_venv() {
    local mark=$venv/made-by-cbn_det printed
    if [ -e "$venv" ] && [ ! -e "$mark" ]; then
        fail ".venv exists and was not made by this Makefile: activate it if it has detectron2, or move it away."
    fi
    [ -e "$mark" ] && [ "$(cat "$mark")" = "$*" ] && return
    rm -rf "$venv"
    # The mark names WHAT only at the end: a .venv that was broken off is known to be ours and is made anew.
    { mkdir "$venv" && echo unfinished >"$mark"; } 2>/dev/null || disk_full
    if ! printed=$("$base" -m venv "$venv" 2>&1); then
        ! is_full "$printed" || disk_full
        if grep -qiE 'no module named|ensurepip' <<<"$printed"; then
            fail "$base cannot make virtual environments: install its venv module (Debian, Ubuntu: the package python3-venv), or name another python: make PYTHON=/path/to/python3 ..."
        fi
        fail "$base -m venv .venv failed: $(tail -n 1 <<<"$printed")"
    fi
    printf '%s\n' "$*" >"$mark" || disk_full
}

# choose_python: sets $python.
choose_python() {
    local names=${MODULES// /,}
    if works "$base" "detectron2.layers, torchvision.ops"; then
        if works "$base" "$names"; then
            python=$("$base" -c "import sys; print(sys.executable)")
            return
        fi
        new_venv "over $("$base" -c 'import sys; print(sys.version_info[:2], sys.prefix)')"
        # --system-site-packages would show another python's packages where $PYTHON is a virtual environment.
        "$base" -c "import sys; print('import site;', '; '.join(f'site.addsitedir({p!r})' for p in sys.path if p.endswith(('site-packages', 'dist-packages'))))" \
            >"$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/outer.pth"
        requirements >"$root/.make/requirements.txt"
        # .venv's own setuptools hides the one outside, and detectron2 needs pkg_resources.
        pip_install -r "$root/.make/requirements.txt" "setuptools<81"
        check_venv "detectron2.layers, torchvision.ops, $names"
    else
        say "$base has no working detectron2: using an environment of our own, .venv, and the standalone engine."
        new_venv "full $("$base" -c 'import sys; print(sys.version_info[:2], sys.base_prefix)')"
        requirements >"$root/.make/requirements.txt" || disk_full
        # One command, so that pip resolves torch and torchvision as a pair.
        # shellcheck disable=SC2086
        pip_install $TORCH_PAIR -r "$root/.make/requirements.txt"
        works "$venv/bin/python" "torchvision.ops" ||
            fail "torch and torchvision in .venv do not fit each other: set TORCH_PAIR='torch==X torchvision==Y' to a matching pair, run make distclean and try again."
        check_venv "$names"
    fi
    python=$venv/bin/python
}

# remembered: sets $python to what an earlier call chose, unless the python has changed since.
remembered() {
    python=
    [ -e "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$now" ] && python=$(tail -n 1 "$stamp")
    [ -n "$python" ] && [ -x "$python" ]
}

newer_python() {
    local name
    for name in python3.14 python3.13 python3.12 python3.11 python3.10; do
        if "$name" -c "" >/dev/null 2>&1; then
            printf '%s' "$name"
            return
        fi
    done
    printf '/path/to/python3'
}

"$base" -c "" >/dev/null 2>&1 || fail "no python at '$base': install Python 3.10 or newer, or name one: make PYTHON=$(newer_python) ..."
"$base" -c "import sys; sys.exit(sys.version_info < (3, 10))" || fail "$("$base" --version 2>&1) is too old: Python 3.10 or newer is needed: make PYTHON=$(newer_python) ..."

# With our own .venv activated, the python to look at is the one below it.
if [ "$("$base" -c 'import sys; print(sys.prefix)')" = "$venv" ] && [ -e "$venv/made-by-cbn_det" ]; then
    base=$("$base" -c 'import sys; print(sys._base_executable)')
fi

mkdir -p "$root/.make" 2>/dev/null || fail "cannot write to $root: check its permissions and the free disk space."
now=$(fingerprint)
if ! remembered; then
    exec 3>&2
    trap 'say "stopped: the same command goes on from here."; exit 130' INT
    trap stop_beat EXIT
    # One set-up at a time. The lock is the open file's, so it ends with this process, however it ends.
    exec 9>"$root/.make/lock" || disk_full
    if ! "$base" -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX | fcntl.LOCK_NB)" 2>/dev/null; then
        say "another make is setting up .venv here: waiting for it."
        "$base" -c "import fcntl; fcntl.flock(9, fcntl.LOCK_EX)" || true
    fi
    if ! remembered; then
        rm -f "$stamp" # whatever it says: .venv changes now
        choose_python
        printf '%s\n%s\n' "$now" "$python" >"$stamp" || disk_full
    fi
    exec 9>&- 3>&-
    trap - INT EXIT
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$@"
