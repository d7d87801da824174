"""Tasks by name."""

import dataclasses
from typing import Literal

from tw_jax.config_fields import SHORTHAND
from tw_jax.tasks.multiplication import Multiplication, MultiplicationConfig
from tw_jax.tasks.sum_of_products import SumOfProducts, SumOfProductsConfig
from tw_jax.tasks.task import Task


@dataclasses.dataclass(frozen=True)
class TaskConfig:
    """Which task, and the settings of each; only those of the named one are used.

    `task=sum_of_products` is short for `task.name`.

    Attributes:
      name: the task.
      multiplication: settings of `multiplication`.
      sum_of_products: settings of `sum_of_products`.
    """

    name: Literal["multiplication", "sum_of_products"] = dataclasses.field(
        default="multiplication", metadata={SHORTHAND: True}
    )
    multiplication: MultiplicationConfig = MultiplicationConfig()
    sum_of_products: SumOfProductsConfig = SumOfProductsConfig()


def make_task(config: TaskConfig) -> Task:
    """Builds the task that a config names."""
    if config.name == "multiplication":
        return Multiplication(config.multiplication)
    return SumOfProducts(config.sum_of_products)
