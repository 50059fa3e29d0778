"""What does a search of learning rates miss? The demo again, with every rate of a 2^⅛ grid around the best one.

    scaling-jax scan experiments/demo_dense.py

At each batch size seven neighbouring rates are trained to the lowest loss, and more until the best lies between others.
Takes half an hour on two CPU cores. Expect B_crit as in the demo, within the intervals, and rates that lie side by side
to differ by 6 % in their steps. results/demo_dense holds ours; docs/measuring.md compares searches on these runs.
"""

import dataclasses

from scaling_jax.scanning.experiment import DEMO


def _dense(subject):
    rates = dataclasses.replace(subject.learning_rates, factor=2**0.125, places=1, together=7, most=30, search="grid")
    return dataclasses.replace(subject, learning_rates=rates)


EXPERIMENT = dataclasses.replace(DEMO, name="demo-dense", subjects=tuple(map(_dense, DEMO.subjects)))
