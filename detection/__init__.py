"""From a pre-trained backbone to object detection: conversion, and training with Detectron2."""
