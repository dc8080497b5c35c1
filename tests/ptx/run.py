"""Calls a function of a file here and prints what it returns as JSON: ``run.py FILE FUNCTION ARGUMENTS``."""

import importlib
import json
import sys

if __name__ == "__main__":
    module, function, arguments = sys.argv[1:]
    result = getattr(importlib.import_module(module), function)(**json.loads(arguments))
    print("\n" + json.dumps(result))
