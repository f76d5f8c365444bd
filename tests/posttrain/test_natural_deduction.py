"""The checker of proofs: it accepts nothing that is false, and says why it refuses."""

import random
import re

import pytest

from dsv3_jax.posttrain.formulas import Statement, statement_of
from dsv3_jax.posttrain.natural_deduction import MAX_CHARACTERS, NAMES, RULES, checked
from tests.posttrain.logic import holds, random_formula, random_proof

# Of each rule a proof that uses it, or lets go of an assumption by it.
PROOFS = {
    "p, q |- p & q": "3. p & q by and_intro 1 2",
    "p & q |- q & p": "2. q by and_right 1\n3. p by and_left 1\n4. q & p by and_intro 2 3",
    "p |- (p | q) & (q | p)": "2. p | q by or_left 1\n3. q | p by or_right 1\n"
    "4. (p | q) & (q | p) by and_intro 2 3",
    "p | q, ~p |- q": "3. q by or_not_left 1 2",
    "p | q, ~q |- p": "3. p by or_not_right 1 2",
    "p -> q, q -> r |- p -> r": "3. p by assume\n4. q by mp 1 3\n5. r by mp 2 4\n"
    "6. p -> r by imp_intro 3 5",
    "p -> q, ~q |- ~p": "3. ~p by mt 1 2",
    "|- p -> q -> p": "1. p by assume\n2. q -> p by imp_true 1\n3. p -> q -> p by imp_intro 1 2",
    "~p |- p -> q": "2. p -> q by imp_false 1",
    "p, ~q |- ~(p -> q)": "3. ~(p -> q) by not_imp 1 2",
    "~p |- ~(p & q)": "2. ~(p & q) by not_and_left 1",
    "~q |- ~(p & q)": "2. ~(p & q) by not_and_right 1",
    "~p, ~q |- ~(p | q)": "3. ~(p | q) by not_or 1 2",
    "~(p | q) |- ~p & ~q": "2. ~p by not_or_left 1\n3. ~q by not_or_right 1\n"
    "4. ~p & ~q by and_intro 2 3",
    "~~p |- ~~~~p": "2. p by from_not_not 1\n3. ~~p by not_not 2\n4. ~~~~p by not_not 3",
    "p -> ~p |- ~p": "2. p by assume\n3. ~p by mp 1 2\n4. false by contradiction 2 3\n"
    "5. ~p by not_intro 2 4",
    "false |- r": "2. r by explosion 1",
    "|- p | ~p": "1. p | ~p by excluded_middle",
    "p | q |- q | p": "2. p by assume\n3. q | p by or_right 2\n4. q by assume\n"
    "5. q | p by or_left 4\n6. q | p by cases 1 2 3 4 5",
    "p |- p": "\n 2. p by copy 1 \n\n",
}


@pytest.mark.parametrize("statement", PROOFS)
def test_a_proof_is_accepted(statement: str):
    lines = checked(statement_of(statement), PROOFS[statement])
    assert holds(statement_of(statement))
    assert lines[-1].formula == statement_of(statement).goal


def test_every_rule_has_its_proof_here():
    said = " ".join(PROOFS.values()).split()
    assert not [name for name in NAMES if name not in said]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_holds_in_every_case(name: str):
    """And so does each of its instances, whatever is put in for its letters."""
    assert holds(RULES[name])


def test_what_is_accepted_is_true_by_truth_tables():
    """Of random proofs a part is accepted; all of these are of true statements, line by line."""
    draw = random.Random(0)
    accepted, letting_go, refused_true = 0, 0, 0
    for _ in range(4000):
        statement, text = random_proof(draw)
        try:
            lines = checked(statement, text)
        except ValueError:
            refused_true += holds(statement)
            continue
        accepted += 1
        assert holds(statement), text
        letting_go += "_intro" in text and "assume" in text
        for line in lines:
            supposed = [o.formula for n, o in enumerate(lines, 1) if line.rests >> n & 1]
            assert holds(Statement((*statement.premises, *supposed), line.formula)), text
    assert accepted > 400
    assert letting_go > 100
    assert refused_true > 1000


def test_a_proof_that_says_something_else_is_refused():
    """One formula of an accepted proof replaced: never accepted, unless it is still true."""
    draw = random.Random(1)
    refused = 0
    for _ in range(1500):
        statement, text = draw.choice(list(PROOFS.items()))
        steps = text.strip().split("\n")
        place = draw.randrange(len(steps))
        head, _, reason = steps[place].rpartition(" by ")
        steps[place] = f"{head.split('.')[0]}. {random_formula(draw, 2)} by {reason}"
        wanted = statement_of(statement)
        changed = Statement(wanted.premises, random_formula(draw, 2))
        for claimed in (wanted, changed):
            try:
                checked(claimed, "\n".join(steps))
            except ValueError:
                refused += 1
                continue
            assert holds(claimed)
    assert refused > 2000


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "it has 0 steps; allowed: 1 to 298"),
        ("p because I say so", "step 3: 'p because I say so' is no step; allowed: NUMBER. FORMULA"),
        ("3. p by", "is no step"),
        ("3. p by copy 1 x", "is no step"),
        ("3. p by copy 0", "is no step"),
        ("3. p by copy 99999", "is no step"),
        ("1. p by copy 1", "step 3: its number is '1'"),
        ("\u0663. p by copy 1", "its number is"),
        ("3. p by magic 1", "step 3: no rule 'magic'"),
        ("3. p by copy 3", "step 3: it cites 3, which does not come before it"),
        ("3. p by copy 4\n4. p by copy 1", "it cites 4, which"),
        ("3. p by copy", "copy cites 1 lines, here 0"),
        ("3. p by assume 1", "assume cites 0 lines, here 1"),
        ("3. q by copy 1", "copy gives p, not q"),
        ("3. q by mp 1 2", "mp is a -> b, a |- b, and p does not fit"),
        ("3. q by or_left 1", "or_left is a |- a | b, not q"),
        ("3. p by copy 1", "it ends with p, not with the goal"),
        ("3. p & q by assume", "its end rests on the assumption of step 3"),
        ("3. q by assume\n4. p & q by and_intro 1 3", "rests on the assumption of step 3"),
        ("3. p -> q by imp_intro 1 2", "step 3: step 1 is no assumption"),
        ("3. p by assume\n4. ~p by not_intro 3 1", "not_intro wants false in its second line"),
        ("3. p & by copy 1", "step 3: 'p &' is no formula"),
        ("3. p by assume\n4. p by cases 1 3 3 3 3", "cases wants p | p in its first line, not p"),
    ],
)
def test_a_refusal_says_where_and_why(text: str, said: str):
    with pytest.raises(ValueError, match=re.escape(said)):
        checked(statement_of("p, q |- p & q"), text)


def test_a_case_may_rest_on_nothing_else():
    """Each case ends in r, which was supposed outside of both."""
    steps = ["2. r by assume", "3. p by assume", "4. q by assume", "5. r by cases 1 3 2 4 2"]
    with pytest.raises(ValueError, match="its end rests on the assumption of step 2"):
        checked(statement_of("p | q |- r"), "\n".join(steps))
    steps[3:] = ["5. r by cases 2 3 2 4 2"]
    with pytest.raises(ValueError, match=r"cases wants p \| q in its first line, not r"):
        checked(statement_of("p | q |- r"), "\n".join(steps))


def test_hostile_text_is_refused_before_it_costs_anything():
    """Bounds of length, lines and depth; a message stays short whatever is refused."""
    claimed = statement_of("p |- p")
    doubling = ["2. p & p by and_intro 1 1"]
    doubling += [f"{n}. p & p by and_intro {n - 1} {n - 1}" for n in range(3, 290)]
    for text in (
        "2. p by copy 1\n" * (MAX_CHARACTERS // 15 + 1),
        "\n".join(f"{n}. p by copy 1" for n in range(2, 400)),
        f"2. {'(' * 9000}p by copy 1",
        f"2. {'~' * 900}p by copy 1",
        f"2. p{' & p' * 240} by copy 1",
        "2. p" + " by" * 6000,
        " by " * 4000,
        "2. " + "p" * 990 + " by copy 1",
        "\n".join(doubling),
        f"{'9' * 10_000}. p by copy 1",
        f"2. p by copy {'1' * 10_000}",
        "\x00" * 1000,
    ):
        with pytest.raises(ValueError, match=r"^step [23]: |^it has") as refused:
            checked(claimed, text)
        assert len(str(refused.value)) < 300


def test_the_longest_proof_is_read():
    steps = "\n".join(f"{n}. p by copy {n - 1}" for n in range(2, 301))
    assert len(checked(statement_of("p |- p"), steps)) == 300
