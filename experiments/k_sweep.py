"""How much does the best of K draws gain? One cell, every K from 1 to 64.

python experiments/k_sweep.py
python experiments/k_sweep.py sampling.num_draws=128 activations.num_activations=256
python experiments/k_sweep.py scoring.ks=[1,2,4,8] sampling.num_draws=8
python experiments/k_sweep.py autoencoder.checkpoint=PATH.pt     # a TAE checkpoint, scored on raw vectors
python experiments/k_sweep.py autoencoder.checkpoint=PATH.pt --checkpoint-data --base DIR     # on its own data, base model at DIR
"""

from ksweep import Cell, Sampling, Sweep, sweep_main
from ksweep.config.presets import demo_pair, held_out_passages

sweep = Sweep(
    name="k_sweep",
    question="How does the fraction of variance explained grow with the number of draws?",
    cell=Cell(
        autoencoder=demo_pair(),
        activations=held_out_passages(num_activations=64),
        sampling=Sampling(temperature=0.7, num_draws=64, max_new_tokens=40),
    ),
)

if __name__ == "__main__":
    sweep_main(sweep)
