// The grids of the I-quants: which combinations of levels a type can store, and where the others may go.
//
// A point is a word of levels, `bits` for each of its dimensions, the first lowest. The points on the grid come from
// the caller; map and neighbour lists are built here as iq2xs_init_impl and iq3xs_init_impl of ggml-quants.c build
// them: a list holds the grid points of the nearest few distances, by distance and then by number in the grid,
// because the first of equally good neighbours wins.
#pragma once

#include <cstdint>

namespace localmix {

struct Grid {
    int dimensions, bits, levels;  // 8, 2, 3 or 4, 3, 8
    int distances;                 // how many different distances a list reaches
    // By point. On the grid: its number. Off the grid: ~(start << 9 | length) of its neighbour list.
    int32_t* map;
    // Points, not numbers. Every list starts at a multiple of 16 and is filled up with its last neighbour.
    uint16_t* neighbours;
};

enum GridName { GRID_IQ2_XXS, GRID_IQ2_XS, GRID_IQ2_S, GRID_IQ1, GRID_IQ3_XXS, GRID_IQ3_S, GRIDS };

extern Grid grids[GRIDS];

}  // namespace localmix
