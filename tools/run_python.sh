#!/usr/bin/env bash
# run_python.sh ARGUMENTS...  runs python from the source tree in an environment that has what make needs.
#
# The current python ($PYTHON, default python3) is used where detectron2 and torchvision work in it, and
# nothing is ever installed into it: what is missing for tests and demo goes to .venv, laid over it.
# Otherwise .venv is a full environment with a matching pair of torch and torchvision (a CPU build of
# torch beside another torchvision fails at import: "operator torchvision::nms does not exist").
# The outcome is remembered in .make/python until the python's packages or setup.py change.
set -euo pipefail
shopt -s inherit_errexit 2>/dev/null || true

TORCH_PAIR=${TORCH_PAIR:-torch==2.14.1 torchvision==0.29.1}
MODULES="numpy fvcore pycocotools cv2 sklearn matplotlib rich tabulate tensorboard pytest pytest_timeout xdist black ruff"

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
venv=$root/.venv
stamp=$root/.make/python
log=$root/.make/install.log
base=${PYTHON:-python3}

fail() { printf 'cbn_det: %s\n' "$*" >&2; exit 1; }
say() { printf 'cbn_det: %s\n' "$*" >&2; }

# pip_install WHAT...: into .venv, shown live and kept in the log; one line says what to do when it fails.
pip_install() {
    say "installing into .venv: $* (log: .make/install.log)"
    if ! "$venv/bin/python" -m pip install "$@" 2>&1 | tee "$log" |
        { grep --line-buffered -v 'already satisfied' >&2 || true; }; then
        if grep -qiE 'no space left|disk quota' "$log"; then
            fail "the disk is full: free about 10 GB (see df -h), then run the same command again."
        elif grep -qiE 'connection|timed out|timeout|name resolution|ProxyError|SSLError|No matching distribution' "$log"; then
            fail "packages could not be fetched: check the network and pip's index (pip config list), then run the same command again."
        fi
        fail "pip failed: read .make/install.log, then run the same command again."
    fi
}

requirements() { "$base" -c "import runpy; m = runpy.run_path('$root/setup.py'); print('\n'.join(m['REQUIRES'] + m['EXTRAS']['demo'] + m['EXTRAS']['test']))"; }

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

# new_venv WHAT...: an empty .venv, unless one for the same WHAT is there already.
new_venv() {
    if [ -e "$venv" ] && [ ! -e "$venv/made-by-cbn_det" ]; then
        fail ".venv exists and was not made by this Makefile: activate it if it has detectron2, or move it away."
    fi
    [ -e "$venv/made-by-cbn_det" ] && [ "$(cat "$venv/made-by-cbn_det")" = "$*" ] && return
    rm -rf "$venv"
    "$base" -m venv "$venv" >"$log" 2>&1 ||
        fail "python -m venv failed ($(tail -n 1 "$log")): install the venv module of your python (Debian: python3-venv) or free disk space, then try again."
    printf '%s\n' "$*" >"$venv/made-by-cbn_det"
}

choose_python() {
    local names=${MODULES// /,}
    if works "$base" "detectron2.layers, torchvision.ops"; then
        if works "$base" "$names"; then
            "$base" -c "import sys; print(sys.executable)"
            return
        fi
        new_venv "over $("$base" -c 'import sys; print(sys.version_info[:2], sys.prefix)')"
        # --system-site-packages would show another python's packages where $PYTHON is a virtual environment.
        "$base" -c "import sys; print('import site;', '; '.join(f'site.addsitedir({p!r})' for p in sys.path if p.endswith(('site-packages', 'dist-packages'))))" \
            >"$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/outer.pth"
        requirements >"$root/.make/requirements.txt"
        # .venv's own setuptools hides the one outside, and detectron2 needs pkg_resources.
        pip_install -r "$root/.make/requirements.txt" "setuptools<81"
        works "$venv/bin/python" "detectron2.layers, torchvision.ops, $names" ||
            fail "the packages laid over $base do not import: run .venv/bin/python -c 'import detectron2.layers, $names' to see why."
    else
        say "no working detectron2 in $base: using an environment of our own in .venv (a few GB, once)."
        new_venv "full $("$base" -c 'import sys; print(sys.version_info[:2], sys.base_prefix)')"
        requirements >"$root/.make/requirements.txt"
        # One command, so that pip resolves torch and torchvision as a pair.
        # shellcheck disable=SC2086
        pip_install $TORCH_PAIR -r "$root/.make/requirements.txt"
        works "$venv/bin/python" "torchvision.ops" ||
            fail "torch and torchvision in .venv do not fit each other: set TORCH_PAIR='torch==X torchvision==Y' to a matching pair, run make distclean and try again."
        works "$venv/bin/python" "$names" ||
            fail "the packages in .venv do not import: run .venv/bin/python -c 'import $names' to see why."
    fi
    printf '%s\n' "$venv/bin/python"
}

"$base" -c "" >/dev/null 2>&1 || fail "no python at '$base': install Python 3.10 or newer, or name one: make PYTHON=/path/to/python3 ..."
"$base" -c "import sys; sys.exit(sys.version_info < (3, 10))" || fail "$("$base" --version 2>&1) is too old: Python 3.10 or newer is needed: make PYTHON=/path/to/python3 ..."

# With our own .venv activated, the python to look at is the one below it.
if [ "$("$base" -c 'import sys; print(sys.prefix)')" = "$venv" ] && [ -e "$venv/made-by-cbn_det" ]; then
    base=$("$base" -c 'import sys; print(sys._base_executable)')
fi

mkdir -p "$root/.make" 2>/dev/null || fail "cannot write to $root: check its permissions and the free disk space."
now=$(fingerprint)
python=
[ -e "$stamp" ] && [ "$(head -n 1 "$stamp")" = "$now" ] && python=$(tail -n 1 "$stamp")
if [ -z "$python" ] || [ ! -x "$python" ]; then
    python=$(choose_python)
    printf '%s\n%s\n' "$now" "$python" >"$stamp"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$python" "$@"
