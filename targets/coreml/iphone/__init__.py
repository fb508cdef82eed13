"""Xcode project of an app that times a Core ML package on iPhones and iPads."""
