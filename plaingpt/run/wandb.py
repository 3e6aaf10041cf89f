"""Weights & Biases as a sink of a run's numbers and samples."""
import os
import re
import secrets
import sys
from typing import Any

from plaingpt import console
from plaingpt.errors import python

SECRET = re.compile(r'key|secret|password|token(?!s|iz)', re.IGNORECASE)  # in the name of a setting
NAMES = {'loss': 'train/loss', 'train_loss': 'train/loss_evaluated'}  # of a row, as nanoGPT has them


def new_id() -> str:
    """Return an id for a run that has none yet. It goes into the checkpoint, so that the run is continued under it."""
    return secrets.token_hex(4)


class Wandb:
    """The wandb run `run_id`, begun or continued. It never asks for a key, and raises whatever stands in the way."""

    def __init__(self, project: str, name: str, run_id: str, out_dir: str, settings: dict[str, Any]) -> None:
        import wandb

        if wandb.setup().settings.mode == 'online' and not wandb.login(prompt=False):
            raise RuntimeError(f'there is no API key (run `{python()} -m wandb login`, or set WANDB_MODE=offline)')
        typed, sys.argv = sys.argv, [*map(console.shown, sys.argv)]  # wandb keeps the command line
        self.run = wandb.init(
            project=project,
            name=name or None,
            id=run_id,
            resume='allow',
            dir=os.environ.get('WANDB_DIR', out_dir),
            config={setting: value for setting, value in settings.items() if not SECRET.search(setting)},
            allow_val_change=True,
        )
        sys.argv = typed
        # `iter` is the x axis: a resumed run repeats steps, and wandb refuses to let its own `step` go back.
        self.run.define_metric('iter')
        self.run.define_metric('*', step_metric='iter')
        self.run.define_metric('val/loss', step_metric='iter', summary='min')

    def row(self, step: int, values: dict[str, float]) -> None:
        self.run.log(wandb_row(step, values))

    def sample(self, step: int, text: str) -> None:
        import wandb

        self.run.log({'iter': step, 'sample': wandb.Table(columns=['iter', 'text'], data=[[step, text]])})

    def close(self, exit_code: int) -> None:
        self.run.finish(exit_code=exit_code)


def wandb_row(step: int, values: dict[str, float]) -> dict[str, float]:
    """Return a row under nanoGPT's names: iter, train/loss, val/loss, lr, mfu in percent; the rest likewise."""
    return {'iter': step} | {
        NAMES.get(name, re.sub('^val_', 'val/', name)): 100 * value if name == 'mfu' else value
        for name, value in values.items()
    }
