"""An ``nvcc`` that is a shell script: it writes its arguments to the file that it is to make, or fails.

Asked with ``--dryrun`` it makes nothing; so does the real one, and says whether it sees a GPU.
"""

from __future__ import annotations

from pathlib import Path

RELEASE = "Cuda compilation tools, release 13.0, V13.0.48"
MAKES = f"""#!/bin/sh
if [ "$1" = --version ]; then echo "nvcc: NVIDIA (R) Cuda compiler driver"; echo "{RELEASE}"; exit; fi
case "$*" in *--dryrun*) exit;; esac
said="$*"
while [ "$1" != -o ]; do shift; done
echo "$said" > "$2"
"""
_WARNS = """echo "nvcc warning : Cannot find valid GPU for '-arch=native', default arch is used" >&2
"""
SEES_NO_GPU_LATE = MAKES + _WARNS  # one that does not say it when asked
SEES_NO_GPU = f"""#!/bin/sh
{_WARNS}case "$*" in *--dryrun*) exit;; esac
echo "it compiled all the same" >&2
exit 3
"""
FAILS = """#!/bin/sh
for i in 1 2 3 4 5 6 7 8; do echo "attention.h($i): error: line $i" >&2; done
exit 2
"""


def script(folder: Path, text: str, name: str = "nvcc") -> Path:
    """An executable file of that text in ``folder``, which is made where it is not there."""
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(text)
    path.chmod(0o755)
    return path
