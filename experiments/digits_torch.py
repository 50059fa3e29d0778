"""Which batch size for a PyTorch classifier of scikit-learn's digits? The same scan by ask and tell, and by a command.

    python experiments/digits_torch.py [RESULTS]      # ask and tell; results/digits_torch unless given

    scaling-jax scan experiments/digits_torch.py --jobs 2 --command 'python experiments/digits_torch_trainer.py
        --batch {batch} --learning-rate {learning_rate} --seed {seed} --steps {max_steps} --curve {curve}'

Both need `pip install torch scikit-learn`.
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
            sj.LearningRates(peak=1.6, reference_batch_tokens=64),
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
