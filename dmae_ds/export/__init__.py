"""A student for others: written in another library's layout, loaded back by that library, compared, and described by a card."""
