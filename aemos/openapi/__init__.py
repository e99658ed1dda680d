"""The OpenAPI document: what REST framework cannot know of the API's operations, their errors and their fields."""
