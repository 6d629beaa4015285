#!/usr/bin/env bash
# PyTorch 2.13.0: what torch.save writes with pickle protocol 4 or 5, torch.load refuses without running code.
#
# torch.save takes a `pickle_protocol`, and some trainers give Python's own default, 4. torch.load(weights_only=True), the
# default since 2.6, reads protocols 2 and 3 and ends with "Unsupported operand 149" (the opcode FRAME) on the others, though
# the file holds tensors alone. Its message advises weights_only=False, which runs whatever code is in the file.
#
# Seen with torch 2.13.0: protocols 2 and 3 load, 4 and 5 are an UnpicklingError.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet torch==2.13.0 numpy==2.4.6
"$folder/venv/bin/python" - <<'PYTHON'
import io
import pickle
import re
import warnings

import torch

warnings.simplefilter("ignore")
print("torch", torch.__version__)
loaded = {}
for protocol in (2, 3, 4, 5):
    file = io.BytesIO()
    torch.save({"weight": torch.zeros(2)}, file, pickle_protocol=protocol)
    file.seek(0)
    try:
        loaded[protocol] = bool((torch.load(file, weights_only=True)["weight"] == 0).all())
        print(f"protocol {protocol}: loaded")
    except pickle.UnpicklingError as error:
        loaded[protocol] = False
        why = re.findall(r"[^.\n]*(?:Unsupported operand|protocol)[^\n]*", str(error))
        print(f"protocol {protocol}: {why[0].strip() if why else str(error).splitlines()[-1]}")
assert loaded == {2: True, 3: True, 4: False, 5: False}, f"this finding is out of date: {loaded}"
PYTHON
