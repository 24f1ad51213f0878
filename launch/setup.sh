# Sourced by the other scripts: a virtual environment in .venv with the package and the extras
# named in $1. Set DOPSD_VENV for another place, PYTHON for another interpreter (3.11 or 3.12).
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
VENV="${DOPSD_VENV:-.venv}"
if [ ! -x "$VENV/bin/python" ]; then
  "${PYTHON:-python3}" -m venv "$VENV"
fi
# The stamp is the list of requirements: a second start installs nothing.
STAMP="$VENV/.installed-${1//,/-}"
if ! cat requirements.txt pyproject.toml | cmp -s - "$STAMP"; then
  echo "installing into $VENV"
  "$VENV/bin/python" -m pip install --quiet --upgrade pip
  # Extras with torch first: a CPU build, where one is to be had, must be there before the
  # packages that would bring the CUDA build.
  case ",$1," in *,test,*) "$VENV/bin/python" -m pip install --quiet "torch==2.13.0" ;; esac
  "$VENV/bin/python" -m pip install --quiet -e ".[$1]"
  cat requirements.txt pyproject.toml > "$STAMP"
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
