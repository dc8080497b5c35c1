"""Calls a function of a file here: ``run.py FILE FUNCTION ARGUMENTS``; the last line that it prints is JSON."""

import importlib
import json
import sys

import host

if __name__ == "__main__":
    file, function, words = sys.argv[1:]
    arguments = json.loads(words)
    host.load(arguments.pop("architecture"))
    print("\n" + json.dumps(getattr(importlib.import_module(file), function)(**arguments)))
