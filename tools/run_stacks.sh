#!/usr/bin/env bash
# run_stacks.sh ARGUMENTS...  runs the tests of tests/stacks with the training libraries they are about.
#
# The libraries go to .venv-stacks, laid over the python that run_python.sh chooses: nothing is installed
# into that one, and its torch stays. It takes half a minute and 300 MB, once; ARGUMENTS are pytest's.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
lists=(tests/stacks/requirements.txt tests/stacks/alone.txt)
venv=$PWD/.venv-stacks

# Its own packages, in the order it looks for them, and its torch as a constraint.
outer=$(tools/run_python.sh -c "
import site, sys, torch
print('import site;', '; '.join(f'site.addsitedir({p!r})' for p in sys.path if p.endswith(('site-packages', 'dist-packages'))))
print(sys.executable)
print('torch==' + torch.__version__.split('+')[0])")
wanted=$(printf '%s\n' "$outer"; cat "${lists[@]}")
if [ "$(cat "$venv/made-of" 2>/dev/null)" != "$wanted" ]; then
    rm -rf "$venv"
    "$(sed -n 2p <<<"$outer")" -m venv "$venv"
    sed -n 1p <<<"$outer" >"$("$venv/bin/python" -c "import sysconfig; print(sysconfig.get_path('purelib'))")/outer.pth"
    sed -n 3p <<<"$outer" >"$venv/constraints.txt"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check -c "$venv/constraints.txt" -r "${lists[0]}"
    "$venv/bin/python" -m pip install -q --disable-pip-version-check --no-deps -r "${lists[1]}"
    printf '%s\n' "$wanted" >"$venv/made-of"
fi
OMP_NUM_THREADS=1 PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" exec "$venv/bin/python" -m pytest tests/stacks "$@"
