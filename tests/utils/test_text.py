from aimnet2mult.utils.text import element_ranges, text_table


def test_table_has_columns_as_wide_as_needed_and_numbers_to_the_right():
    lines = text_table(("part", "weights", "what"), [("mlps", 12345, "loaded"), ("a longer name", 7, "")])
    assert lines == ["part           weights  what", "mlps            12,345  loaded", "a longer name        7"]


def test_table_without_rows_is_its_header():
    assert text_table(("a", "b"), []) == ["a  b"]


def test_runs_of_elements_are_short():
    assert element_ranges([1, 6, 7, 8, 9, 35, 36]) == "H (1), C (6) to F (9), Br (35), Kr (36)"
    assert element_ranges([]) == ""
