"""Train a byte-level language model with mixture-of-experts layers beside its dense twin of equal active parameters.

    python -m experiments.train_lm                          # under five minutes on two CPU cores
    python -m experiments.train_lm --steps 20               # a smoke test
    python -m experiments.train_lm --text book.txt log.txt  # one's own text
    python -m experiments.train_lm --router mixtral --out runs/mixtral
    python -m experiments.train_lm --resume                 # after Ctrl-C, a kill or a power cut
    torchrun --nproc-per-node 2 -m experiments.train_lm --expert-parallel 2   # experts on two ranks

Both models begin with the same attention and see the same batches in the same order. What they cost and how well they
predict files that neither has seen is printed as a table and drawn to a picture; `result.json` holds the numbers.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from .language_model.corpus import Corpus, load_corpus
from .language_model.report import RESULT, draw, table, write_result
from .language_model.settings import Settings, add_options, settings_from
from .language_model.training import Training


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_arguments(argv)
    settings = settings_from(args)
    corpus = load_corpus(args.text)
    training = make_training(args, settings, corpus)
    training.say(corpus)
    if not args.resume and not args.overwrite:
        training.refuse_to_overwrite()
    elif args.resume and training.has_checkpoint():
        training.load()
        training.say(f"going on after step {training.step}")
    try:
        training.run(args.stop_at)
    except KeyboardInterrupt:
        print(f"\nstopped; the last checkpoint is in {args.out}: --resume goes on from it")
        return 130
    if training.finished and training.first:
        report(training)
    training.close()
    return 0


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    description, _, examples = (__doc__ or "").partition("\n\n")
    parser = argparse.ArgumentParser(
        description=description, epilog=examples, formatter_class=HelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--text", nargs="+", type=Path, default=[], help="files to learn from in place of Python's")
    parser.add_argument("--out", type=Path, default=Path("runs/train_lm"), help="folder of the checkpoint and results")
    parser.add_argument("--resume", action="store_true", help="go on from the checkpoint in --out, if there is one")
    parser.add_argument("--overwrite", action="store_true", help="start again though --out has an unfinished run")
    parser.add_argument("--stop-at", type=int, help="save a checkpoint and stop after this step")
    parser.add_argument(
        "--expert-parallel", type=int, metavar="RANKS", help="spread experts and batch over the processes of torchrun"
    )
    add_options(parser)
    return parser.parse_args(argv)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Shows defaults, and the examples as they are written."""


def make_training(args: argparse.Namespace, settings: Settings, corpus: Corpus) -> Training:
    """A run in this process, or one that several processes share."""
    if args.expert_parallel is None:
        return Training(settings, corpus, args.out)
    from .language_model.expert_parallel import ShardedTraining

    return ShardedTraining(settings, corpus, args.out, args.expert_parallel)


def report(training: Training) -> None:
    """Print the table; write the numbers and the picture."""
    result = write_result(training)
    print(table(result["results"]))
    picture = training.out / "train_lm.png"
    draw(training.trainees, picture)
    print(f"wrote {training.out / RESULT} and {picture}")


if __name__ == "__main__":
    sys.exit(main())
