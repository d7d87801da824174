"""Tasks by config."""

from tw_jax.tasks.multiplication import Multiplication, MultiplicationConfig
from tw_jax.tasks.sum_of_products import SumOfProducts, SumOfProductsConfig
from tw_jax.tasks.task import Task

TaskConfig = MultiplicationConfig | SumOfProductsConfig

TASK_CONFIGS: dict[str, type[TaskConfig]] = {
    Multiplication.name: MultiplicationConfig,
    SumOfProducts.name: SumOfProductsConfig,
}


def make_task(config: TaskConfig) -> Task:
    """Builds the task that a config describes."""
    match config:
        case MultiplicationConfig():
            return Multiplication(config)
        case SumOfProductsConfig():
            return SumOfProducts(config)
