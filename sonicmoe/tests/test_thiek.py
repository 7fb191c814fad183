import pytest

from sonicmoe.thiek import Thiek, parse


def test_reads_five_numbers():
    thiek = parse("4096, 2048,1024,128,8")
    assert thiek == Thiek(T=4096, H=2048, I=1024, E=128, K=8)
    assert thiek.rows == 4096 * 8
    assert parse(str(thiek)) == thiek


@pytest.mark.parametrize("text", ["", "1,2,3,4", "1,2,3,4,5,6", "1,2,3,4,k"])
def test_refuses_what_is_not_five_integers(text):
    with pytest.raises(ValueError, match=r"must be five integers T,H,I,E,K"):
        parse(text)


def test_refuses_a_number_that_is_too_small():
    assert parse("0,8,8,1,1").T == 0
    with pytest.raises(ValueError, match=r"thiek='-1,8,8,1,1': T=-1 must be at least 0"):
        parse("-1,8,8,1,1")
    with pytest.raises(ValueError, match=r"K=0 must be at least 1"):
        parse("1,8,8,1,0")
