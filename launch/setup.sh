# shellcheck shell=bash
# Sourced by the other scripts: a virtual environment in .venv with the package and the extras
# named in $1, which may be empty. Set DOPSD_VENV for another place, PYTHON for another interpreter
# (3.11 or newer).
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
VENV="${DOPSD_VENV:-.venv}"

fail() { echo "error: $*" >&2; exit 1; }

# Version and home of an interpreter, "3.11.7 /usr"; those of a virtual environment's maker.
describe() {
  "$1" -c 'import sys
print("%d.%d.%d " % sys.version_info[:3] + getattr(sys, "base_prefix", sys.prefix))' 2>/dev/null
}

if [ -e "$VENV/bin" ]; then
  # Nothing is deleted here: it may hold what was installed by hand.
  HAVE="$(describe "$VENV/bin/python")" ||
    fail "the Python in $VENV does not run (was it removed?); delete $VENV and start again"
  if [ -n "${PYTHON:-}" ]; then
    WANT="$(describe "$PYTHON")" || fail "PYTHON=$PYTHON does not run"
    [ "$HAVE" = "$WANT" ] || fail "$VENV was made by Python $HAVE, but PYTHON=$PYTHON is $WANT;" \
      "delete $VENV, choose another place with DOPSD_VENV, or leave PYTHON unset to use it as it is"
  fi
else
  HAVE="$(describe "${PYTHON:-python3}")" ||
    fail "${PYTHON:-python3} does not run; choose a Python, as in PYTHON=python3.12 bash $0"
fi
IFS=. read -r MAJOR MINOR _ <<< "$HAVE"
if [ "$MAJOR" -lt 3 ] || { [ "$MAJOR" -eq 3 ] && [ "$MINOR" -lt 11 ]; }; then
  fail "Python 3.11 or newer is needed, found $HAVE; choose one, as in PYTHON=python3.12 bash $0," \
    "and delete $VENV if it is there"
fi
if [ ! -e "$VENV/bin" ]; then
  "${PYTHON:-python3}" -m venv "$VENV" || {
    rm -rf "${VENV:?}/bin"  # so that the next start does not take it for whole
    fail "could not make $VENV; on Debian and Ubuntu: apt install python3-venv"
  }
fi
# The stamp is the list of requirements: a second start installs nothing.
STAMP="$VENV/.installed-${1//,/-}"
if ! cat requirements.txt pyproject.toml | cmp -s - "$STAMP"; then
  echo "installing into $VENV"
  "$VENV/bin/python" -m pip install --quiet --upgrade pip
  # Extras with torch first: a CPU build, where one is to be had, must be there before the
  # packages that would bring the CUDA build.
  case ",$1," in *,test,*) "$VENV/bin/python" -m pip install --quiet "torch==2.13.0" ;; esac
  "$VENV/bin/python" -m pip install --quiet -e ".${1:+[$1]}"
  cat requirements.txt pyproject.toml > "$STAMP"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
