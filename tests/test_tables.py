"""The tables that experiments.tables writes, against figures by hand."""

from experiments import tables


def line(study, variant, seed, *dice):
    patients = [
        {'patient': f'p{n}', 'dice': value, 'surface_dice': value / 2}
        for n, value in enumerate(dice)
    ]
    about = {'commit': 'abcdefghij', 'device': 'cpu'}
    return {'study': study, 'variant': variant, 'seed': seed, 'patients': patients, **about}


def test_ablations_are_differences_to_the_base_of_the_same_seed(monkeypatch):
    lines = [
        line('base', 'base', 0, 0.5, 0.7),
        line('base', 'base', 1, 0.6, 0.6),
        line('bins', 'no pyramid', 0, 0.4, 0.7),
        line('bins', 'no pyramid', 1, 0.7, 0.8),
        line('networks', 'unet', 0, 0.9, 0.8),
    ]
    monkeypatch.setattr(tables, 'read_lines', lambda _: lines)
    rows = [row for row in tables.ablation().splitlines() if row.startswith('| ')][1:]
    assert '| base | 2 | 0.600 |  |  | 0.300 |' in rows
    assert '| no pyramid | 2 | 0.650 | +0.050 | -0.050, +0.150 | 0.325 |' in rows
    assert '| unet | 1 | 0.850 |  |  | 0.425 |' in rows
    assert not any('global average' in row for row in rows)  # was not run
    assert sum('| base ' in row for row in rows) == 1  # a study of the base alone has no table
