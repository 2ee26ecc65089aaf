"""The online half: every request is screened by PSIM before the classifier sees it."""
