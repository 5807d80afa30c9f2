"""schemas.py SCHEMA FILE..: what is wrong with TOML files by a JSON schema, one line a problem."""

import json
import sys
import tomllib

import jsonschema

validator = jsonschema.Draft7Validator(json.load(open(sys.argv[1])))
for path in sys.argv[2:]:
    with open(path, "rb") as file:
        for error in validator.iter_errors(tomllib.load(file)):
            print(f"{path}: {'.'.join(map(str, error.path))}: {error.message}")
