"""Which checkpoint explains activations best? Several pairs are run over the same activations, so that differences are paired.

    python experiments/checkpoint_sweep.py                    # the demo's AR before and after its training
    python experiments/checkpoint_sweep.py --config my_pairs.yaml

my_pairs.yaml:

    autoencoder:
    - {av: runs/step1000/av, ar: runs/step1000/ar}
    - {av: kitft/nla-qwen2.5-7b-L20-av, ar: kitft/nla-qwen2.5-7b-L20-ar}
    activations: {model: Qwen/Qwen2.5-7B-Instruct, text: held_out.jsonl, min_position: 50}
"""

from ksweep import Cell, Sampling, Sweep, sweep_main
from ksweep.config.presets import demo_pair, held_out_passages

sweep = Sweep(
    name="checkpoint_sweep",
    question="How much does training the reconstructor gain?",
    cell=Cell(
        autoencoder=demo_pair(),
        activations=held_out_passages(num_activations=128),
        sampling=Sampling(temperature=0.7, num_draws=16, max_new_tokens=40),
    ),
    axes={"autoencoder": (demo_pair(trained_ar=False), demo_pair())},
)

if __name__ == "__main__":
    sweep_main(sweep)
