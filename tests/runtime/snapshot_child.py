"""Go on from saved states in a process of its own, and print what comes of it.

    python snapshot_child.py BUNDLE JOBS

JOBS is a JSON file: a list of [state file, inputs .npy, cuts]. Prints one line a job: the SHA-256 of all logits and of
the state in the end.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from streaming import digests

import famexport as fx


def main(bundle: str, jobs: str) -> None:
    with fx.load(bundle, "ort-cpu", threads=1) as session:
        for state, inputs, cuts in json.loads(Path(jobs).read_text()):
            with session.stream() as stream:
                stream.restore(fx.Snapshot.load(state))
                print(json.dumps(digests(stream, np.split(np.load(inputs), cuts, axis=1))))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
