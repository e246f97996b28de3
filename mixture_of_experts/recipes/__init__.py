"""Recipes for published models. A recipe contains the settings of a model's routers and experts::

    recipes.mixtral(dim=64, num_experts=8, hidden_dim=128)    # a plain MoE
    recipes.MODELS["mixtral"]                                 # its recipe

`models.py` contains the recipes, and `builder.py` contains the functions that build layers from them.
"""

from mixture_of_experts.recipes.builder import (
    PublishedModel,
    Recipe,
    RecipeFunction,
    SharedExpert,
    build,
    list_gate_arguments,
    make_gate,
    make_recipe_activation,
    make_recipe_function,
)
from mixture_of_experts.recipes.models import MODELS

__all__ = [
    "PublishedModel",
    "Recipe",
    "RecipeFunction",
    "SharedExpert",
    "build",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v4",
    "dynamic_moe",
    "ernie4_5",
    "expert_choice",
    "gemma4",
    "gpt_oss",
    "granite4",
    "gshard",
    "kimi_k2",
    "kimi_k3",
    "list_gate_arguments",
    "llama4",
    "longcat_flash",
    "make_gate",
    "make_recipe_activation",
    "minimax_m2",
    "mixtral",
    "nemotron_h",
    "olmoe",
    "phi3_5",
    "qwen2",
    "qwen3",
    "qwen3_next",
    "remoe",
    "shazeer",
    "switch",
    "zaya",
]

#: a function for each recipe that has a summary
FUNCTIONS: dict[str, RecipeFunction] = {
    name: make_recipe_function(name, recipe) for name, recipe in MODELS.items() if recipe.summary
}
gshard: RecipeFunction = FUNCTIONS["gshard"]
switch: RecipeFunction = FUNCTIONS["switch"]
shazeer: RecipeFunction = FUNCTIONS["shazeer"]
expert_choice: RecipeFunction = FUNCTIONS["expert_choice"]
mixtral: RecipeFunction = FUNCTIONS["mixtral"]
olmoe: RecipeFunction = FUNCTIONS["olmoe"]
qwen2: RecipeFunction = FUNCTIONS["qwen2"]
qwen3: RecipeFunction = FUNCTIONS["qwen3"]
qwen3_next: RecipeFunction = FUNCTIONS["qwen3_next"]
deepseek_v2: RecipeFunction = FUNCTIONS["deepseek_v2"]
deepseek_v3: RecipeFunction = FUNCTIONS["deepseek_v3"]
deepseek_v4: RecipeFunction = FUNCTIONS["deepseek_v4"]
nemotron_h: RecipeFunction = FUNCTIONS["nemotron_h"]
kimi_k2: RecipeFunction = FUNCTIONS["kimi_k2"]
kimi_k3: RecipeFunction = FUNCTIONS["kimi_k3"]
minimax_m2: RecipeFunction = FUNCTIONS["minimax_m2"]
ernie4_5: RecipeFunction = FUNCTIONS["ernie4_5"]
granite4: RecipeFunction = FUNCTIONS["granite4"]
gpt_oss: RecipeFunction = FUNCTIONS["gpt_oss"]
llama4: RecipeFunction = FUNCTIONS["llama4"]
gemma4: RecipeFunction = FUNCTIONS["gemma4"]
phi3_5: RecipeFunction = FUNCTIONS["phi3_5"]
longcat_flash: RecipeFunction = FUNCTIONS["longcat_flash"]
dynamic_moe: RecipeFunction = FUNCTIONS["dynamic_moe"]
remoe: RecipeFunction = FUNCTIONS["remoe"]
zaya: RecipeFunction = FUNCTIONS["zaya"]
