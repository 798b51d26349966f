"""Pages that bounce between two places while threads write to them: is anything ever lost?"""
