"""Writes `convnext_jax/interop/published.csv`: the ConvNeXt weights in the registry of the installed timm.

    python -m tests.judges.published RESULTS      # RESULTS: results/results-imagenet.csv of timm's repository

The accuracies come from RESULTS, because the registry has none.
"""

import csv
import sys
from pathlib import Path

import timm

from convnext_jax import interop
from convnext_jax.interop.published import PublishedWeights

TABLE = Path(interop.__file__).parent / 'published.csv'


def from_timm(top1: dict[tuple[str, int], float]) -> list[PublishedWeights]:
    """The weights in timm's registry, with the accuracies for (name with tag, size of the images)."""
    found = []
    for name in sorted([*timm.list_pretrained('convnext*'), *timm.list_pretrained('test_convnext*')]):
        config = timm.get_pretrained_cfg(name)
        assert config.hf_hub_id == f'timm/{name}'
        size, test_size = config.input_size[1], (config.test_input_size or config.input_size)[1]
        found.append(
            PublishedWeights(
                *name.split('.'),
                classes=config.num_classes,
                size=size,
                test_size=test_size,
                top1=top1.get((name, size)),
                test_top1=top1.get((name, test_size)),
                licence=config.license,
            )
        )
    return found


def main(results: str) -> None:
    with open(results, encoding='utf-8') as file:
        top1 = {(row['model'], int(row['img_size'])): float(row['top1']) for row in csv.DictReader(file)}
    with TABLE.open('w', encoding='utf-8', newline='') as file:
        writer = csv.writer(file, lineterminator='\n')
        writer.writerow(PublishedWeights._fields)
        writer.writerows(from_timm(top1))


if __name__ == '__main__':
    main(sys.argv[1])
