"""A trainer as a program: python trainer.py BATCH RATE STEPS CURVE [FAULT]; its losses are made up.

Faults: csv, garbage, nan, half, dies, dies-once, killed, hangs, nothing, starts-over.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

from tests.scanning.made_up_loss import loss_after

batch, rate, steps, curve = int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
fault = sys.argv[5] if len(sys.argv) > 5 else ""
marker = curve.with_name("marker")
first = not marker.exists()
marker.write_text(str(os.getpid()))
with curve.open("a" if fault == "starts-over" else "w") as out:

    def write(line: str, end: str = "\n") -> None:
        out.write(line + end)
        out.flush()

    if fault == "csv":
        write("time,loss,step")
    step = 0
    while step < steps and fault != "nothing":
        step = max(step + 1, int(step * 1.07), 10)
        loss = loss_after(step, batch, rate)
        write(f"0,{loss},{step}" if fault == "csv" else json.dumps({"step": step, "loss": loss}))
        if fault == "garbage" and step == 10:
            write("Epoch 1: loss went down!")
            write('{"step": "many", "loss": []}')
        if step > 200:
            if fault == "nan" or (fault == "starts-over" and first):
                write(json.dumps({"step": step + 1, "loss": None if fault == "nan" else 5.0}))
                sys.exit(0 if fault == "nan" else 3)
            if fault == "dies" or (fault == "dies-once" and first):
                print("out of memory")
                sys.exit(1)
            if fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if fault == "hangs":
                time.sleep(1_000)
            if loss < 1.9:
                break
    if fault == "half":
        write('{"step": 999999, "lo', end="")
