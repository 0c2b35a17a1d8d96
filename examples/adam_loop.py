"""A field trial fitted in a loop written by hand, with torch.optim.Adam: the likelihood is a loss like any other.

Data: an alpha-lattice trial of 24 genotypes in 18 incomplete blocks (John & Williams 1995, Cyclic and Computer
Generated Designs, p. 146). Genotypes and blocks are random, replicates fixed.
"""

import torch

from openreml_nn import REML
from openreml_nn.data import MixedModel

model = MixedModel("john_alpha", "yield ~ rep", random=["gen", "rep:block"])
objective = REML(model.V)
optimizer = torch.optim.Adam(objective.parameters(), lr=0.1)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)

for step in range(200):
    optimizer.zero_grad()
    loss = objective(model.y, model.X)
    loss.backward()
    optimizer.step()
    schedule.step()
    if step % 50 == 0:
        print(f"step {step:3d}  log-likelihood {-loss.item():.4f}")

print(f"log-likelihood {-objective(model.y, model.X).item():.4f}")
for name, value in zip(model.V.natural_names, model.V.natural(model.V.theta).tolist(), strict=True):
    print(f"{name:18s} {value:.4f}")
