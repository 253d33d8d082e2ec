"""The first thing that runs in an image: lays out the ground floor in a volume, and has it compiled.

It comes as text on a command line (``python3 -c``), with the files on standard input, and answers with a line
of JSON. Any Python 3 can read it, so that one that is too old can say so.
"""

import json
import os
import sys

LEAST = (3, 9)
WARM = "flowagent.runtime.container", "flowagent.runtime.warmth"


def main(root: str, digest: str) -> None:
    stream = sys.stdin.buffer
    listed = json.loads(stream.readline().decode())
    target = os.path.join(root, digest)
    for name, size in listed:
        data = stream.read(size)
        path = os.path.join(target, name)
        if not os.path.isdir(os.path.dirname(path)):
            os.makedirs(os.path.dirname(path))
        # by a rename: flows may be reading the one that is there
        with open(path + ".new", "wb") as file:
            file.write(data)
        os.rename(path + ".new", path)
    sys.path.insert(0, target)
    import importlib

    for module in WARM:
        importlib.import_module(module)
    importlib.import_module("flowagent.runtime.warmth").preload([])


if __name__ == "__main__":
    answer = {"python": list(sys.version_info[:3])}
    if sys.version_info >= LEAST:
        main(*sys.argv[1:])
    sys.stdout.write(json.dumps(answer) + "\n")
