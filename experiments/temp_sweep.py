"""Which temperature gives the best explanations, and does the answer depend on the number of draws?

python experiments/temp_sweep.py                                       # the demo pair, about two and a half minutes on two cores
python experiments/temp_sweep.py --dry-run                             # what would be run, and why
python experiments/temp_sweep.py sampling.num_draws=32 sampling.seed=1
python experiments/temp_sweep.py autoencoder.av=DIR autoencoder.ar=DIR activations.model=DIR
"""

from ksweep import Cell, Sampling, Sweep, sweep_main
from ksweep.config.presets import demo_pair, held_out_passages

sweep = Sweep(
    name="temp_sweep",
    question="Which sampling temperature explains activations best, for each number of draws?",
    cell=Cell(
        autoencoder=demo_pair(),
        activations=held_out_passages(num_activations=128),
        sampling=Sampling(num_draws=16, max_new_tokens=40),
    ),
    axes={"sampling.temperature": (0.4, 0.8, 1.2)},
)

if __name__ == "__main__":
    sweep_main(sweep)
