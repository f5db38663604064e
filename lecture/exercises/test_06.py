def test_it_is_a_factor(work):
    for best, second, entropy in ((1.0, 0.0, 0.0), (0.5, 0.5, 0.69), (0.1, 0.1, 3.0)):
        assert 0 <= work.certainty(best, second, entropy) <= 1


def test_it_beats_the_product_of_probabilities(work):
    plain, _ = work.speed_up(lambda best, second, entropy: best)
    assert work.speed_up(work.certainty)[0] > 1.001 * plain
