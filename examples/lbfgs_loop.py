"""The same trial with torch.optim.LBFGS, and with average information, which needs about six steps.

What depends on the data alone is done once, by ``prepare``; a closure then evaluates the problem at V's present thetas.
"""

import torch
from torch import Tensor

from openreml_nn import REML, AverageInformation
from openreml_nn.data import MixedModel
from openreml_nn.likelihood import average_information
from openreml_nn.optim import Geometry

model = MixedModel("john_alpha", "yield ~ rep", random=["gen", "rep:block"])
V, objective = model.V, REML(model.V)
problem = objective.prepare(model.y, model.X)


def closure() -> Tensor:
    global evaluation
    objective.zero_grad()
    evaluation = problem.evaluate()
    loss = -objective.loglik(evaluation)
    loss.backward()
    return loss


lbfgs = torch.optim.LBFGS(objective.parameters(), max_iter=100, line_search_fn="strong_wolfe")
lbfgs.step(closure)
print(f"LBFGS                log-likelihood {-closure().item():.4f}")

V.set_theta(torch.zeros_like(V.theta))
newton = AverageInformation(
    objective.parameters(), lambda: average_information(evaluation), geometry=lambda: Geometry.of(V)
)
while True:
    newton.step(closure)
    if newton.progress.done:
        break
progress = newton.progress
print(f"AverageInformation   log-likelihood {progress.loglik:.4f} in {progress.iteration} steps: {progress.reason}")
for name, value in zip(V.natural_names, V.natural(V.theta).tolist(), strict=True):
    print(f"{name:18s} {value:.4f}")
