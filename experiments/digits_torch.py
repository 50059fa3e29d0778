"""Which batch size for a PyTorch classifier of scikit-learn's digits? The same scan by ask and tell, and by a command.

    python experiments/digits_torch.py [RESULTS]      # ask and tell; results/digits_torch unless given

    TRAIN='python experiments/digits_torch_trainer.py {batch} {learning_rate} {seed} {max_steps} {curve}'
    scaling-jax scan experiments/digits_torch.py --jobs 2 --command "$TRAIN"

Both need `pip install torch scikit-learn`, and make the same 77 runs: the trainer of `digits_torch_trainer.py` at seven
batch sizes, three seeds, and three to five learning rates each. They took 1 min 38 s (ask and tell) and 2 min 33 s (a
command, which imports PyTorch for each run) on two CPU cores that others used as well. Expect B_crit of about 17
images [11, 48] at losses of 0.5 to 0.42. Lower losses need the fewest images at about 20 images a batch and more below:
there is a best batch there, and no B_crit to quote. The notes say so, and that all of this takes less than 100 steps:
1,400 images are a toy. experiments/results/digits_torch holds ours.
"""

import multiprocessing
import sys
from pathlib import Path

import scaling_jax as sj

WORKERS = 2
EXPERIMENT = sj.Experiment(
    name="digits_torch",
    subjects=(
        sj.Subject(
            sj.OtherModel("mlp", 4_874, unit="images"),
            sj.log_spaced(0.5, 0.32, 6),
            sj.LearningRates(peak=1.6, reference_batch_tokens=64, places=1),
        ),
    ),
    batch_tokens=sj.powers_of_two(8, 512),  # images
    max_tokens=500_000,
    seeds=(0, 1, 2),
    text="scikit-learn's digits / 16, the first 1,400 to train on",
)


def work(results: Path) -> None:
    """One worker of the study in a folder."""
    from digits_torch_trainer import evaluations

    study = sj.Study(EXPERIMENT, results)
    while (setting := study.ask()) is not None:
        steps: list[int] = []
        losses: list[float] = []
        for step, loss in evaluations(setting.batch, setting.learning_rate, setting.seed, setting.max_steps):
            steps.append(step)
            losses.append(loss)
            if study.should_stop(setting, step, loss):
                break
        study.tell(setting, steps, losses)


def main(results: Path) -> None:
    workers = [multiprocessing.Process(target=work, args=(results,)) for _ in range(WORKERS)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    if any(worker.exitcode for worker in workers):
        sys.exit("a worker failed: see above, then give the same command again")
    from scaling_jax.cli.results import show

    show(results)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path("results") / EXPERIMENT.name)
